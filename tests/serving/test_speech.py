"""Text comes in pieces that are never taken back, and a stop text is never told."""

from __future__ import annotations

import random

import pytest

from vlmtune.models.families import load_family
from vlmtune.serving.speech import BROKEN, Speech
from vlmtune.testing import tiny

TEXTS = ("结果是 x² + 🐎🏇 naïve.", "\\frac { a } { b } \n\n  two  spaces", "plain words", "é")


@pytest.fixture(scope="module", params=["qwen2_vl", "idefics3", "gemma3"])
def tokenizer(request, tmp_path_factory):
    """Byte-level BPE, and SentencePiece with bytes for what it does not know."""
    folder = tiny(request.param, tmp_path_factory.mktemp("speech") / request.param)
    return load_family(str(folder)).parts.tokenizer


def told(speech, ids):
    pieces = []
    for token in ids:
        pieces.append(speech.hear(token))
        if speech.stopped:
            return pieces
    return [*pieces, speech.finish()]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text(tokenizer, text):
    ids = ids_of(tokenizer, text)
    pieces = told(Speech(tokenizer, ""), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any(BROKEN in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 1 or len(ids) < 3


def test_a_character_is_never_halved(tokenizer):
    ids = ids_of(tokenizer, "🐎")
    if len(ids) > 1:
        pieces = told(Speech(tokenizer, ""), ids)
        assert "".join(pieces).strip() == "🐎"
        assert not any(pieces[: len(ids) - 1])
        # Negative control: decoding token by token halves it.
        assert BROKEN in "".join(tokenizer.decode([token]) for token in ids)


def test_any_tokens_at_all(tokenizer):
    """A random model says halves of characters and control tokens, too."""
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(300) for _ in range(rng.randint(1, 20))]
        speech = Speech(tokenizer, "")
        pieces = told(speech, ids)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces) == speech.told
        if "<0x00>" not in tokenizer.get_vocab():  # there, a later byte breaks an earlier one
            assert speech.told == whole


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["one"], ""),
        ("aab", ["ab"], "a"),
        ("a\nb\n\nc", ["\n\n"], "a\nb"),
        ("x END", ["END OF", "END"], "x "),
        ("结果是 END", ["是 E"], "结果"),
        ("one two", ["twofold"], "one two"),
        ("ababac", ["abac"], "ab"),
    ],
)
def test_stops(tokenizer, text, stops, left):
    """Across tokens, overlapping themselves, and beginnings that come to nothing."""
    ids = ids_of(tokenizer, text)
    text = tokenizer.decode(ids, skip_special_tokens=True)  # SentencePiece may add a blank
    speech = Speech(tokenizer, "", stops)
    pieces = told(speech, ids)
    assert "".join(pieces) == speech.told
    assert speech.told.strip(" ") == left.strip(" ")
    assert speech.stopped == any(stop in text for stop in stops)
    for length in range(1, len(pieces)):  # no prefix of what was told holds a stop's beginning
        assert text.startswith("".join(pieces[:length]))


def test_the_stop_that_is_whole_first_ends_the_answer(tokenizer):
    rng = random.Random(1)
    stopped = 0
    for _ in range(300):
        text = "".join(rng.choice("ab \n") for _ in range(30))
        stops = ["".join(rng.choice("ab \n") for _ in range(rng.randint(1, 5))) for _ in range(2)]
        ids = ids_of(tokenizer, text)
        speech = Speech(tokenizer, "", stops)
        told(speech, ids)
        for length in range(1, len(ids) + 1):
            whole = tokenizer.decode(ids[:length], skip_special_tokens=True)
            places = [place for stop in stops if (place := whole.find(stop)) >= 0]
            if places:
                break
        assert speech.told == (whole[: min(places)] if places else whole)
        stopped += speech.stopped
    assert 50 < stopped < 300


@pytest.mark.parametrize("lead", [" ", "  x", "Answer: "])
def test_a_lead_is_no_part(tokenizer, lead):
    """What a template has the model write before its answer, e.g. the blank of ``Assistant: ``."""
    ids = ids_of(tokenizer, "|" + lead + "yes indeed")[1:]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    speech = Speech(tokenizer, lead)
    assert "".join(told(speech, ids)) == whole.removeprefix(lead)
    other = Speech(tokenizer, "zzz")
    assert "".join(told(other, ids)) == whole
