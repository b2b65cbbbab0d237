"""The original's tiny checkpoint with what it computes, and networks that are always there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from qwen_vl_network import Golden, tiny_network


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def original(shared_data: Path) -> Golden:
    """Golden data of the network. Read only."""
    return Golden(shared_data / "qwen_vl_golden" / "model")


@pytest.fixture(scope="session")
def network(original: Golden) -> Any:
    """The golden checkpoint in fp32, in evaluation mode. A test that changes it loads its own."""
    return original.load()


@pytest.fixture(scope="session")
def tiny() -> Any:
    """A random network. Read only."""
    return tiny_network()
