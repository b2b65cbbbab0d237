"""A browser for all tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from devtools import NAMES, Browser, find_browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless browser; where there is none, the tests are skipped (CI installs one)."""
    if find_browser() is None:
        pytest.skip(f"there is no headless browser ({', '.join(NAMES)}); apt-get install chromium")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()
