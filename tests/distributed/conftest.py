"""A small model, mixed rows, and recipes that train on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.mixed import MakeMixed, mixed_recipe, mixed_rows, trained
from planted import write_dataset


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third of the rows has no image, a third one, a third several."""
    out = tmp_path_factory.mktemp("mixed") / "data"
    return write_dataset(out, mixed_rows("row", 18), mixed_rows("validation", 7))


@pytest.fixture(scope="session")
def make(tiny_base: Path, mixed: Path) -> MakeMixed:
    """``mixed_recipe`` on the shared base and the mixed rows."""

    def recipe(**changes):
        return mixed_recipe(tiny_base, mixed, **changes)

    return recipe


@pytest.fixture(scope="session")
def single(make: MakeMixed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    return trained(make(), tmp_path_factory.mktemp("single") / "run")
