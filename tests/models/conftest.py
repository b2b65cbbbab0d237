from __future__ import annotations

from pathlib import Path

import pytest

from tiny_rows import encoder_of, lively
from vlmtune.models.encode import Encoder
from vlmtune.testing import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model. Read only."""
    return tiny("qwen2_vl", tmp_path_factory.mktemp("models") / "tiny", seed=3)


@pytest.fixture(scope="session")
def encoder(folder: Path) -> Encoder:
    return encoder_of(folder)


@pytest.fixture(scope="session")
def model(folder: Path):
    """The tiny model in fp32. A test that changes it loads its own."""
    return lively(folder)
