"""Macro-F1 and the confusion matrix against a plain counting of every class."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vlmtune.evaluation.classes import matrix
from vlmtune.evaluation.intervals import compare, estimate
from vlmtune.evaluation.metric import row_score, statistics, value
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.run import Prediction, scored

METRIC = find("macro_f1")


def reference(truth: list[str], said: list[str]) -> float:
    """By definition: precision and recall of each class that is true of a row, then the mean."""
    values = []
    for name in set(truth):
        true_positive = sum(a == b == name for a, b in zip(truth, said, strict=True))
        precision = true_positive / max(said.count(name), 1)
        recall = true_positive / truth.count(name)
        both = precision + recall
        values.append(2 * precision * recall / both if both else 0.0)
    return sum(values) / len(values)


def answers(seed: int, rows: int = 80) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    truth = draw.choices(("cat", "dog", "fox", "owl"), (8, 4, 2, 1), k=rows)
    said = [name if draw.random() < 0.6 else draw.choice(("cat", "dog", "ox")) for name in truth]
    return truth, said


def f1(truth: list[str], said: list[str]) -> float:
    return value(METRIC, statistics(METRIC, said, [[name] for name in truth]))


@pytest.mark.parametrize("seed", range(10))
def test_it_is_the_mean_of_every_class_s_f1(seed):
    truth, said = answers(seed)
    assert f1(truth, said) == pytest.approx(reference(truth, said), abs=1e-12)
    # Negative control: accuracy, which rare classes hardly move, is another number.
    accuracy = np.mean([a == b for a, b in zip(truth, said, strict=True)])
    assert f1(truth, said) != pytest.approx(accuracy, abs=1e-3)


def test_a_hand_made_case():
    truth = ["a", "a", "a", "b", "b", "c"]
    said = ["a", "a", "b", "b", "x", "a"]
    # a: precision 2/3, recall 2/3. b: 1/2, 1/2. c: never said.
    assert f1(truth, said) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert f1(truth, truth) == 1.0
    assert f1(truth, ["x"] * 6) == 0.0


def test_case_spacing_and_other_spellings_are_the_same_class():
    references = [["Red Panda", "panda"], ["dog"], ["dog"]]
    said = [" PANDA ", "Dog", "red  panda"]
    # The third answer names the first row's class by its name.
    assert value(METRIC, statistics(METRIC, said, references)) == pytest.approx(
        (2 * 1 / (2 + 1) + 2 * 1 / (1 + 2)) / 2
    )
    assert row_score(METRIC, "panda", references[0]) == 1.0
    assert row_score(METRIC, "dog", references[0]) == 0.0


def test_resampled_rows_are_counted_exactly():
    truth, said = answers(3)
    stats = statistics(METRIC, said, [[name] for name in truth])
    counts = np.random.default_rng(0).multinomial(80, np.full(80, 1 / 80), size=(2, 3))
    values = METRIC.value(counts.astype(float), stats)
    assert values.shape == (2, 3)
    drawn = [row for row, times in enumerate(counts[1, 2]) for _ in range(times)]
    expected = reference([truth[row] for row in drawn], [said[row] for row in drawn])
    assert values[1, 2] == pytest.approx(expected)
    interval = estimate(METRIC, stats)
    assert 0 < interval.low < interval.value < interval.high < 1


def test_two_models_are_compared_over_the_same_classes():
    truth, said = answers(4)
    better = [name if row % 3 else said[row] for row, name in enumerate(truth)]
    references = [[name] for name in truth]
    first, second = (statistics(METRIC, each, references) for each in (said, better))
    found = compare(METRIC, first, second, seed=0)
    assert found.value == pytest.approx(reference(truth, better) - reference(truth, said))
    assert found.verdict == "better"
    assert compare(METRIC, second, first, seed=0).verdict == "worse"


def test_the_confusion_matrix_is_kept_beside_the_value():
    truth = ["a", "a", "a", "b", "b", "c"]
    said = ["a", "a", "b", "b", "x", "a"]
    rows = [
        Prediction(str(row), "?", name, (real,), True, 1, 1, {})
        for row, (real, name) in enumerate(zip(truth, said, strict=True))
    ]
    evaluation = scored(rows, ["macro_f1"], 4)
    details = evaluation.details["macro_f1"]
    assert details["classes"] == ["a", "b", "c"]
    assert matrix(details).tolist() == [[2, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]]
    assert details["per_class"][0] == {
        "precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3), "rows": 3,
    }  # fmt: skip
    assert [each["f1"] for each in details["per_class"]] == pytest.approx([2 / 3, 1 / 2, 0])
    assert np.mean([each["f1"] for each in details["per_class"]]) == pytest.approx(
        evaluation.metrics["macro_f1"].value
    )
    (remark,) = evaluation.remarks()
    assert remark.startswith("macro_f1: 3 classes; 1 answers name none of them; most often 'a'")
