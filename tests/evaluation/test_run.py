import json
import math
from dataclasses import replace

import pytest

from tiny_rows import asked, encoder_of, lively, picture
from tiny_world import lines
from vlmtune.errors import DataError, UsageError
from vlmtune.evaluation import run
from vlmtune.evaluation.intervals import score
from vlmtune.evaluation.metric import row_score
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.run import Evaluation, evaluate_rows, longest_answer

METRICS = ("exact_match", "edit_similarity", "cer", "bleu")
ANSWERS = ("a b c d", "x", "one two three", "\\frac { 1 } { 2 }", "z z")


@pytest.fixture(scope="module")
def model(tiny_base):
    return lively(tiny_base)


@pytest.fixture(scope="module")
def encoder(tiny_base):
    return encoder_of(tiny_base, prompt="Read this.")


@pytest.fixture(scope="module")
def rows():
    """Longest first and last, so that batches by length are in another order than the split."""
    sizes = ((130, 60), (28, 28), (90, 60), (28, 56), (120, 60))
    return [
        replace(
            asked("Which? " * (n % 3), answer, picture(size, seed=n)), id=f"row-{n}", references=()
        )
        for n, (answer, size) in enumerate(zip(ANSWERS, sizes, strict=True))
    ]


@pytest.fixture(scope="module")
def evaluation(model, encoder, rows):
    return evaluate_rows(model, encoder, rows, METRICS, batch_rows=2)


def test_predictions_stand_in_the_split_s_order(model, encoder, rows, evaluation):
    assert [prediction.id for prediction in evaluation.predictions] == [row.id for row in rows]
    for row, prediction in zip(rows, evaluation.predictions, strict=True):
        alone = evaluate_rows(
            model, encoder, [row], METRICS, max_new_tokens=evaluation.max_new_tokens
        )
        assert alone.predictions == (prediction,)
    # Negative control: the rows are not all answered alike.
    assert len({prediction.prediction for prediction in evaluation.predictions}) > 1
    assert len({prediction.prompt_tokens for prediction in evaluation.predictions}) > 1


def test_the_question_is_the_one_the_model_saw(evaluation):
    assert evaluation.predictions[0].question == "Read this."
    assert evaluation.predictions[1].question == "Which? "


def test_progress_counts_rows(model, encoder, rows):
    seen = []
    evaluate_rows(
        model, encoder, rows, ["cer"], max_new_tokens=1, batch_rows=2, progress=seen.append
    )
    assert seen == [2, 4, 5]


def test_every_reference_is_acceptable(model, encoder, rows, evaluation):
    assert [p.references for p in evaluation.predictions] == [(answer,) for answer in ANSWERS]
    assert evaluation.predictions[0].scores["exact_match"] == 0.0  # negative control
    said = evaluation.predictions[0].prediction
    known = [replace(rows[0], references=("something", said)), *rows[1:]]
    again = evaluate_rows(model, encoder, known, METRICS, batch_rows=2)
    assert again.predictions[0].references == ("something", said)
    assert again.predictions[0].scores["exact_match"] == 1.0
    assert again.metrics["exact_match"].value == pytest.approx(1 / 5)


def test_scores_are_the_metrics(evaluation):
    predictions = [prediction.prediction for prediction in evaluation.predictions]
    references = [prediction.references for prediction in evaluation.predictions]
    assert evaluation.metrics == score(METRICS, predictions, references, seed=0)
    for prediction in evaluation.predictions:
        assert prediction.scores == {
            name: row_score(find(name), prediction.prediction, prediction.references)
            for name in METRICS
        }
    mean = sum(prediction.scores["edit_similarity"] for prediction in evaluation.predictions) / 5
    assert evaluation.metrics["edit_similarity"].value == pytest.approx(mean)


def test_an_answer_may_be_half_as_long_again_as_the_longest_label(encoder, rows, evaluation):
    labels = [len(encoder.text_ids(answer)) + 1 for answer in ANSWERS]  # and the end
    assert evaluation.max_new_tokens == longest_answer(encoder, rows)
    assert evaluation.max_new_tokens == math.ceil(1.5 * max(labels))
    assert max(p.completion_tokens for p in evaluation.predictions) <= evaluation.max_new_tokens
    assert longest_answer(encoder, rows[1:2]) == math.ceil(1.5 * labels[1])


def test_an_answer_that_was_cut_is_noted(model, encoder, rows, evaluation):
    cut = evaluate_rows(model, encoder, rows, ["cer"], max_new_tokens=1)
    assert [(p.finished, p.completion_tokens) for p in cut.predictions] == [(False, 1)] * 5
    assert cut.max_new_tokens == 1
    for prediction in evaluation.predictions:
        assert prediction.finished or prediction.completion_tokens == evaluation.max_new_tokens


def test_no_rows_are_an_error_that_says_what_to_do(model, encoder):
    with pytest.raises(UsageError, match=r"prepare the data with --validation 0\.1"):
        evaluate_rows(model, encoder, [], METRICS)


def test_a_metric_that_no_row_can_have_is_refused_before_anything_is_asked(encoder, rows):
    broken = [replace(rows[0], references=("\\broken{",))]
    with pytest.raises(DataError, match="not one of the references of the 1 rows can be drawn"):
        evaluate_rows(None, encoder, broken, ["render_match"])


def test_answers_that_were_cut_are_counted(evaluation, tmp_path):
    first, *others = evaluation.predictions
    known = [replace(each, finished=True) for each in others]
    one = replace(evaluation, predictions=(replace(first, finished=False), *known))
    assert one.cut_at_limit == 1
    assert one.remarks() == [f"1 of 5 answers were cut at {evaluation.max_new_tokens} tokens"]
    one.write(tmp_path / "after")
    summary = json.loads((tmp_path / "after/metrics.json").read_text(encoding="utf-8"))
    assert summary["cut_at_limit"] == 1
    none = replace(evaluation, predictions=(replace(first, finished=True), *known))
    assert (none.cut_at_limit, none.remarks()) == (0, [])
    unknown = replace(evaluation, predictions=(replace(first, finished=None), *known))
    assert (unknown.cut_at_limit, unknown.remarks()) == (None, [])


def test_what_is_written_is_read_again(evaluation, tmp_path):
    folder = tmp_path / "evaluation" / "after"
    assert Evaluation.read(folder) is None
    evaluation.write(folder)
    assert Evaluation.read(folder) == evaluation
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "predictions.jsonl"]
    assert [record["id"] for record in lines(folder / "predictions.jsonl")] == [
        f"row-{n}" for n in range(5)
    ]
    summary = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert summary["samples"] == 5
    assert summary["metrics"] == evaluation.metrics_json()
    assert summary["metrics"]["cer"].keys() == {"value", "low", "high"}


def test_odd_texts_survive(evaluation, tmp_path):
    odd = 'line\u2028separator\x85 "quotes" \\ \n\r\t 🐎 \x00'
    first = replace(evaluation.predictions[0], prediction=odd, question=odd, references=(odd, ""))
    changed = replace(evaluation, predictions=(first, *evaluation.predictions[1:]))
    changed.write(tmp_path / "after")
    assert Evaluation.read(tmp_path / "after") == changed


@pytest.mark.parametrize("torn", ["write_text", "write_json"])
def test_a_torn_write_leaves_nothing_or_what_was_there(evaluation, tmp_path, monkeypatch, torn):
    folder = tmp_path / "after"

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, torn, fail)
        with pytest.raises(KeyboardInterrupt):
            evaluation.write(folder)
    assert not folder.exists()
    assert Evaluation.read(folder) is None
    evaluation.write(folder)  # over what the first left beside it
    assert [path.name for path in tmp_path.iterdir()] == ["after"]
    with monkeypatch.context() as patched:
        patched.setattr(run, torn, fail)
        with pytest.raises(KeyboardInterrupt):
            replace(evaluation, max_new_tokens=1).write(folder)
    assert Evaluation.read(folder) == evaluation
    replace(evaluation, max_new_tokens=1).write(folder)
    assert Evaluation.read(folder) == replace(evaluation, max_new_tokens=1)
