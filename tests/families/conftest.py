"""Every test of this folder runs for every family that can be made tiny.

And for classes that have no family: what is read from a class has to pass the same tests.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from generic_models import CLASSES, SHOWING
from tiny_rows import encoder_of, lively
from vlmtune.data.media import ImagePolicy
from vlmtune.models.encode import Encoder
from vlmtune.testing import FAMILIES, tiny

GENERIC = [
    pytest.param(f"generic:{name}", marks=[pytest.mark.slow] if number else [])
    for number, name in enumerate(SHOWING)  # the first in the default run, the others take long
]


@pytest.fixture(scope="session", params=[*sorted(FAMILIES), *GENERIC])
def name(request: pytest.FixtureRequest) -> str:
    """Name of the family."""
    return str(request.param)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a family's tiny model, made when it is first asked for."""
    place = tmp_path_factory.mktemp("families")

    @cache
    def folder(name: str) -> Path:
        if name.startswith("generic:"):
            return CLASSES[name.removeprefix("generic:")](place / name)
        return tiny(name, place / name, seed=3)

    return folder


@pytest.fixture(scope="session")
def folder(folders: Any, name: str) -> Path:
    """A tiny random model. Read only."""
    return Path(folders(name))


@pytest.fixture(scope="session")
def encoder(folder: Path) -> Encoder:
    """The encoder under the model's own image policy."""
    return encoder_of(folder, ImagePolicy())


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    """The tiny model in fp32, its answers dependent on what it sees. Read only."""
    return lively(folder)
