"""ANLS on the reference implementation's own gold labels and submission."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmtune.evaluation import text_metrics
from vlmtune.evaluation.intervals import score
from vlmtune.evaluation.metrics import row_scores

MEAN = 17 / 45  # (0 + 8/9 + 1 + 0 + 0) / 5, which its own test writes as 0.378


def read(shared_data: Path, case: str) -> tuple[list[str], list[list[str]]]:
    folder = shared_data / "docvqa_anls" / "test_fixtures" / "evaluation" / case
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    gold = json.loads((folder / "gold_label.json").read_text(encoding="utf-8"))["data"]
    said = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    answers = {each["questionId"]: each["answer"] for each in said}
    return [answers[row["questionId"]] for row in gold], [row["answers"] for row in gold]


def test_the_submission_scores_as_published(shared_data):
    answers, references = read(shared_data, "evaluate_json")
    rows = row_scores(["anls"], answers, references)["anls"]
    assert rows == pytest.approx([0.0, 8 / 9, 1.0, 0.0, 0.0], abs=1e-12)
    assert score(["anls"], answers, references)["anls"].value == pytest.approx(MEAN, abs=1e-12)


def test_half_a_word_is_wrong_and_two_thirds_are_not(shared_data):
    answers, references = read(shared_data, "validate_data")  # foo and bar, for baz and baz
    assert row_scores(["anls"], answers, references)["anls"] == pytest.approx([0.0, 2 / 3])


@pytest.mark.parametrize(
    ("name", "value"),
    [("ANLS_THRESHOLD", 1.1), ("normalise", lambda text: text)],
)
def test_the_fixtures_see_threshold_and_case(shared_data, monkeypatch, name, value):
    """Negative control: without the threshold, or minding case, the mean is another."""
    answers, references = read(shared_data, "evaluate_json")
    monkeypatch.setattr(text_metrics, name, value)
    assert score(["anls"], answers, references)["anls"].value != pytest.approx(MEAN, abs=1e-3)
