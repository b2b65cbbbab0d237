"""What every test relies on."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: its threads spin, and a second busy process would cost a factor of 15.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest

pytest_plugins = ["tiny_world"]

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Reference data that lies beside the repository and is no part of it."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder shared/data with reference data is not beside the repository")
    return folder
