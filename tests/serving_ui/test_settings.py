"""The page's controls as settings."""

from __future__ import annotations

import pytest

from vlmtune.serving.webui.controls import settings_of


def test_settings():
    settings = settings_of(0.7, 0.9, 12, " 5 ")
    assert (settings.temperature, settings.top_p) == (0.7, 0.9)
    assert (settings.max_tokens, settings.seed, settings.stream) == (12, 5, True)


@pytest.mark.parametrize("seed", ["", " ", None, "x", "1.5", str(2**70)])
def test_what_is_no_seed_is_none(seed):
    settings = settings_of(0.7, 0.9, 12, seed)
    assert (settings.seed, settings.temperature) == (None, 0.7)


def test_what_is_out_of_range_is_not_set():
    settings = settings_of(99, None, 0, "3")
    assert (settings.temperature, settings.top_p, settings.max_tokens) == (0.0, 1.0, None)
    assert settings.seed == 3
