"""Every phrase is there in every language, with the same gaps to fill."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

import vlmtune
from vlmtune.serving.webui.words import LANGUAGES, NAMES, WORDS, chosen, preferred, say

SOURCE = Path(vlmtune.__file__).parent / "serving" / "webui"


def gaps(text):
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)


@pytest.mark.parametrize("key", WORDS)
def test_a_phrase_is_whole(key):
    phrase = WORDS[key]
    assert list(phrase) == list(LANGUAGES)
    assert all(phrase.values())
    assert gaps(phrase["en"]) == gaps(phrase["zh"])
    assert not re.search(r"[\u3000-\u9fff]", phrase["en"])
    if key != "top_p":  # a name
        assert re.search(r"[\u3000-\u9fff]", phrase["zh"])


def test_no_phrase_is_idle_or_missing():
    used = set()
    for file in SOURCE.glob("*.py"):
        if file.name != "words.py":
            used |= set(re.findall(r"""["']([a-z_]+)["']""", file.read_text(encoding="utf-8")))
    assert set(WORDS) <= used
    assert "examples_infos" not in used  # the control: not everything counts as used


def test_the_language_of_a_browser():
    assert preferred("zh-CN,zh;q=0.9,en;q=0.8") == "zh"
    assert preferred("en-US,zh;q=0.9") == "en"
    assert preferred("") == preferred("de") == "en"
    assert [chosen(NAMES[language]) for language in LANGUAGES] == list(LANGUAGES)
    assert chosen(None) == chosen("Klingon") == "en"
    assert say("en", "failed", reason="{x}") == "No answer: {x}"
