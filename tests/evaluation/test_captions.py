"""Caption metrics against the figures that COCO's evaluation code and nlg-eval publish."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlmtune.evaluation.captions import CAPTION_METRICS, bleu_statistics, cutter, words
from vlmtune.evaluation.metric import row_score, statistics, value
from vlmtune.evaluation.metrics import find

NAMES = [metric.name for metric in CAPTION_METRICS]
PUBLISHED = {
    "caption_bleu_1": 0.579400,
    "caption_bleu_2": 0.404391,
    "caption_bleu_3": 0.278536,
    "caption_bleu_4": 0.190829,
    "rouge_l": 0.396253,
    "cider": 0.599791,
}
KEYS = {
    "caption_bleu_1": "Bleu_1",
    "caption_bleu_2": "Bleu_2",
    "caption_bleu_3": "Bleu_3",
    "caption_bleu_4": "Bleu_4",
    "rouge_l": "ROUGE_L",
    "cider": "CIDEr",
}


@pytest.fixture(scope="module")
def published(shared_data: Path) -> tuple[list[str], list[list[str]]]:
    """A thousand captions and their references, tokens already."""
    folder = shared_data / "caption_metrics"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    accepted = json.loads((folder / "gts.json").read_text(encoding="utf-8"))
    said = json.loads((folder / "res.json").read_text(encoding="utf-8"))
    return [said[key][0] for key in accepted], list(accepted.values())


def corpus(name: str, predictions, references) -> float:
    return value(find(name), statistics(find(name), predictions, references))


@pytest.mark.parametrize("name", NAMES)
def test_published_figures_to_six_decimals(name, published):
    assert round(corpus(name, *published), 6) == PUBLISHED[name]


def test_published_counts_of_n_grams(published):
    stats = statistics(find("caption_bleu_4"), *published).sum(axis=0)
    assert stats[:2].tolist() == [9893, 9855]
    assert stats[2:6].tolist() == [5732, 2510, 1043, 423]
    assert stats[6:].tolist() == [9893, 8893, 7893, 6893]


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_see_one_caption_in_a_thousand(name, published):
    """Negative control."""
    predictions, references = published
    changed = ["a dog", *predictions[1:]]
    assert round(corpus(name, changed, references), 6) != PUBLISHED[name]


def test_the_tokenizer_changes_one_published_caption(published):
    """Theirs kept the period of one bat, and of no other: so tokens are not cut again."""
    predictions, references = published
    texts = [*predictions, *(text for row in references for text in row)]
    odd = [text for text in texts if words(text) != text.split()]
    assert len(texts) > 6000
    assert odd == ["a young baseball player in uniform getting ready to bat."]
    assert cutter(references) is str.split
    # Negative control: cut again, its rare words are others, and CIDEr is not the published one.
    again = [[" ".join(words(text)) for text in row] for row in references]
    assert corpus("cider", predictions, again) == pytest.approx(0.599895, abs=5e-7)


@pytest.mark.parametrize("name", NAMES)
def test_nlg_eval_s_figures(name, shared_data):
    folder = shared_data / "caption_metrics"
    golden = json.loads((shared_data / "golden" / "expected_values.json").read_text())["nlg_eval"]

    def read(file: str) -> list[str]:
        return (folder / f"nlgeval_{file}.txt").read_text(encoding="utf-8").splitlines()

    pairs = list(zip(read("ref1"), read("ref2"), strict=True))
    expected = golden["files hyp/ref1/ref2"][KEYS[name]]
    assert corpus(name, read("hyp"), pairs) == pytest.approx(expected, abs=1e-6)
    expected = golden["ref ['this is a test','this is also a test'] hyp 'this is a good test'"]
    one = corpus(name, ["this is a good test"], [["this is a test", "this is also a test"]])
    assert one == pytest.approx(expected[KEYS[name]], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man, in a hat.", ["a", "man", "in", "a", "hat"]),
        ("It isn't the dog's; they're St. Bernards!", ["it", "is", "n't", "the", "dog", "'s"]),
        ('a "close-up" of 1/2 pizza (cut)', ["a", "close-up", "of", "1/2", "pizza", "cut"]),
        ("on main st. near dr. who", ["on", "main", "st.", "near", "dr.", "who"]),
        ("...", []),
    ],
)
def test_words(text, tokens):
    assert words(text)[: len(tokens)] == tokens
    assert words(" ".join(words(text))) == words(text)


@pytest.mark.parametrize("name", NAMES)
def test_case_and_punctuation_are_nothing(name):
    plain = ["a man in a red hat rides a horse", "two dogs play in the wet snow"] * 3
    raw = [f"{text.capitalize()}." for text in plain]
    references = [[text] for text in raw]
    assert cutter(references) is words
    assert corpus(name, plain, references) == corpus(name, raw, references)
    # And the right answer is the best there is.
    perfect = corpus(name, raw, references)
    assert perfect == pytest.approx(10.0 if name == "cider" else 1.0)
    assert corpus(name, ["a cat sleeps"] * 6, references) < 0.3 * perfect
    lowest, highest = find(name).range
    assert lowest <= perfect <= highest + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_answers_without_words_score_nothing(name):
    references = [["a man in a hat"], ["a dog"]]
    assert corpus(name, ["", "..."], references) == pytest.approx(0.0, abs=1e-6)
    assert row_score(find(name), "", ["a dog"]) == pytest.approx(0.0, abs=1e-6)


def test_of_the_references_the_closest_in_length_counts():
    known = [list("abcde"), list("ab")]
    assert bleu_statistics(list("abc"), known)[:2] == (3.0, 2.0)
    assert bleu_statistics(list("abcd"), known)[:2] == (4.0, 5.0)


def test_resampled_rows_keep_the_rarity_of_words_of_the_whole_set():
    predictions = ["a red bus", "a red dog", "a blue cat", "the snow"]
    references = [["a red bus"], ["a brown dog"], ["a blue cat"], ["white snow"]]
    metric = find("cider")
    stats = statistics(metric, predictions, references)
    counts = np.array([1.0, 2.0, 1.0, 0.0])
    drawn = [0, 1, 1, 2]
    rows = metric.alone(stats)
    assert metric.value(counts, stats) == pytest.approx(np.mean([rows[row] for row in drawn]))
    # Negative control: as a set of their own the drawn rows would score otherwise.
    own = corpus("cider", [predictions[row] for row in drawn], [references[row] for row in drawn])
    assert own != pytest.approx(float(metric.value(counts, stats)))
