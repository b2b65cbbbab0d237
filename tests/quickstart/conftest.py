"""The built-in base, where this checkout has it."""

from __future__ import annotations

import pytest

from vlmtune.models import builtin
from vlmtune.quickstart.base.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def builtin_base() -> str:
    """The name of the built-in base."""
    if not (builtin.FOLDER / "config.json").is_file():
        pytest.skip("this checkout has no weights of the built-in base yet")
    return builtin.BUILTIN


@pytest.fixture(scope="session")
def tokenizer():
    """The base's own."""
    return build_tokenizer()
