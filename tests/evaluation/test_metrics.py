import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from rapidfuzz.distance import Levenshtein

from vlmtune.errors import DataError, UsageError
from vlmtune.evaluation.metric import row_score, statistics, value
from vlmtune.evaluation.metrics import METRICS, find, row_scores
from vlmtune.evaluation.text_metrics import TEXT_METRICS, normalise

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "expected_values.json"
TOKENS = ("\\frac", "{", "}", "1", "2", "x", "_", "^", "\\alpha", "=", "+", ".", "中", "é")


def texts(seed: int, rows: int, references: tuple[int, int] = (1, 3)):
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(TOKENS, k=draw.randint(0, 14)))

    def changed(words: str) -> str:
        return " ".join(w if draw.random() > 0.2 else draw.choice(TOKENS) for w in words.split())

    acceptable = [[text() for _ in range(draw.randint(*references))] for _ in range(rows)]
    return [changed(draw.choice(row)) for row in acceptable], acceptable


def corpus(name: str, predictions, references) -> float:
    metric = METRICS[name]
    return value(metric, statistics(metric, predictions, references))


@pytest.mark.parametrize(
    ("name", "prediction", "references", "expected"),
    [
        ("exact_match", " \\frac { 1 } { 2 }\n", ["x", "\\frac { 1 } { 2 }"], 1.0),
        ("exact_match", "\\frac{1}{2}", ["\\frac { 1 } { 2 }"], 0.0),
        ("exact_match", "Cat", ["cat"], 0.0),
        ("exact_match", "", ["  "], 1.0),
        ("accuracy", "  Red   Panda ", ["dog", "red panda"], 1.0),
        ("accuracy", "red pandas", ["red panda"], 0.0),
        ("edit_similarity", "", [""], 1.0),
        ("edit_similarity", "", ["abc"], 0.0),
        ("edit_similarity", "abcd", ["xyz", "abcx"], 0.75),
        ("cer", "", [""], 0.0),
        ("cer", "abc", ["abcd"], 0.25),
        ("cer", "abcdefgh", ["ab"], 3.0),
        ("cer", "abc", [""], 3.0),
        ("cer", "abcd", ["ab", "abcdefg"], 3 / 7),
        ("anls", "", [""], 1.0),
        ("anls", "ab", ["abcd"], 0.0),  # NL = 0.5 is not < 0.5
        ("anls", "abc", ["abcd"], 0.75),
        ("bleu", "a cat", ["a cat"], 1.0),
        ("bleu", "", ["a cat"], 0.0),
        ("bleu", "dog", ["a cat"], 0.0),
    ],
)
def test_row_values(name, prediction, references, expected):
    assert row_score(find(name), prediction, references) == pytest.approx(expected, abs=1e-12)


def test_edit_similarity_and_cer_are_rapidfuzz_s():
    predictions, references = texts(1, 200)
    expected = np.mean(
        [
            max(Levenshtein.normalized_similarity(prediction, text) for text in row)
            for prediction, row in zip(predictions, references, strict=True)
        ]
    )
    assert corpus("edit_similarity", predictions, references) == pytest.approx(expected, abs=1e-12)

    single = [[row[0]] for row in references]
    edits = sum(
        Levenshtein.distance(prediction, text)
        for prediction, (text,) in zip(predictions, single, strict=True)
    )
    expected = edits / sum(len(text) for (text,) in single)
    assert corpus("cer", predictions, single) == pytest.approx(expected, abs=1e-12)
    # Negative control: a mean of rows' rates is another number.
    assert np.mean(row_scores(["cer"], predictions, single)["cer"]) != pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [1, 3, 60])
def test_bleu_is_sacrebleu_s(seed, rows):
    predictions, references = texts(seed, rows, references=(2, 2))
    streams = list(zip(*references, strict=True))
    expected = sacrebleu.corpus_bleu(predictions, streams, tokenize="13a", force=True).score / 100
    assert corpus("bleu", predictions, references) == pytest.approx(expected, abs=1e-12)


def test_bleu_with_different_numbers_of_references_is_sacrebleu_s():
    predictions, references = texts(7, 80, references=(1, 4))
    assert len({len(row) for row in references}) > 1
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(4)]
    expected = sacrebleu.corpus_bleu(predictions, streams, tokenize="13a", force=True).score / 100
    assert corpus("bleu", predictions, references) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_bleu_of_one_row_is_sacrebleu_s_sentence_score(seed):
    (prediction,), (row,) = texts(seed, 1)
    expected = sacrebleu.BLEU(effective_order=True).sentence_score(prediction, row).score / 100
    assert row_score(find("bleu"), prediction, row) == pytest.approx(expected, abs=1e-12)


def test_anls_is_the_reference_implementation_s():
    if not GOLDEN.is_file():
        pytest.skip(f"{GOLDEN} is not here; it lies beside the repository where this is developed")
    golden = json.loads(GOLDEN.read_text())["anls"]
    scores = row_scores(
        ["anls"], list(golden["expect"]), [golden["answers"]] * len(golden["expect"])
    )["anls"]
    assert scores == pytest.approx(list(golden["expect"].values()), abs=0.005)
    plain = {"The Coca", "CocaCola", "Coca cola", "Cola", "Cat"}
    mean = np.mean([s for s, text in zip(scores, golden["expect"], strict=True) if text in plain])
    assert mean == pytest.approx(golden["file_mean"], abs=0.001)
    for text, pair in golden["similarity_before_threshold"].items():
        found = [
            Levenshtein.normalized_similarity(normalise(text), normalise(answer))
            for answer in golden["answers"]
        ]
        assert found == pytest.approx(pair, abs=0.01)


@pytest.mark.parametrize("name", [metric.name for metric in TEXT_METRICS])
def test_every_metric_of_texts(name):
    metric = find(name)
    assert metric.name == name
    assert metric.meaning
    assert metric.source
    predictions, references = texts(3, 100)
    stats = statistics(metric, predictions, references)
    alone = np.array(row_scores([name], predictions, references)[name])
    lowest, highest = metric.range
    assert ((alone >= lowest) & (alone <= highest)).all()
    # Sums of any shape: a stack of resamples is combined row by row, exactly.
    counts = np.random.default_rng(0).multinomial(100, np.full(100, 0.01), size=(2, 5))
    values = metric.value(counts.astype(float), stats)
    assert values.shape == (2, 5)
    repeated = [i for i, times in enumerate(counts[1, 3]) for _ in range(times)]
    again = corpus(name, [predictions[i] for i in repeated], [references[i] for i in repeated])
    assert values[1, 3] == pytest.approx(again, abs=1e-12)
    # The right answer is the best there is, and a wrong one is not.
    perfect = corpus(name, [row[0] for row in references], references)
    assert perfect == pytest.approx(1.0 if metric.higher_is_better else 0.0)
    wrong = corpus(name, ["zzzz"] * 100, references)
    assert (wrong < perfect) == metric.higher_is_better


def test_every_metric_has_its_line_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = []
    for line in page.splitlines():
        first = line.split("|")[1] if line.startswith("| `") else ""
        named = re.findall(r"`(\w+)`", first)
        names += [f"{named[0][:-1]}{n}" for n in range(1, 5)] if "…" in first else named
    assert names == list(METRICS)


def test_an_unknown_metric_names_the_nearest_and_all():
    with pytest.raises(UsageError) as caught:
        find("edit_similarty")
    assert "did you mean 'edit_similarity'" in str(caught.value)
    assert all(name in str(caught.value) for name in METRICS)
    with pytest.raises(UsageError, match="there is no metric"):
        row_scores(["exact_match", "qqqqqqqqq"], ["a"], [["a"]])


@pytest.mark.parametrize(
    ("predictions", "references", "code"),
    [
        ([], [], "no_rows"),
        (["a"], [], "rows_differ"),
        (["a", "b"], [["a"], []], "no_references"),
        (["a"], ["a string is not a list"], "no_references"),
    ],
)
def test_rows_that_cannot_be_scored(predictions, references, code):
    with pytest.raises(DataError) as caught:
        statistics(find("cer"), predictions, references)
    assert caught.value.code == code
