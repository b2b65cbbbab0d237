"""Boxes found against true ones: by hand, by brute force, and through a whole evaluation."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tiny_rows import SMALL, encoder_of, lively, picture, turn
from vlmtune.data.conversation import Box, Conversation
from vlmtune.errors import DataError, UsageError
from vlmtune.evaluation.box_metrics import iou, paired, share
from vlmtune.evaluation.intervals import estimate
from vlmtune.evaluation.metric import row_score, statistics, value
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.run import Evaluation, Prediction, differences, evaluate_rows, scored

NAMES = ("box_iou", "box_accuracy_50")
SQUARE = (0.0, 0.0, 10.0, 10.0)


def box(*xyxy: float, label: str = "cat", image: int = 0) -> Box:
    x1, y1, x2, y2 = xyxy
    return Box(image, label, (x1, y1, x2, y2))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (SQUARE, SQUARE, 1.0),
        (SQUARE, (5, 0, 15, 10), 1 / 3),
        (SQUARE, (10, 0, 20, 10), 0.0),  # they touch
        (SQUARE, (20, 20, 30, 30), 0.0),
        (SQUARE, (2, 2, 8, 8), 0.36),
        (SQUARE, (10, 10, 0, 0), 0.0),  # corners the wrong way round have no area
        ((5, 5, 5, 5), (5, 5, 5, 5), 1.0),
        ((5, 5, 5, 5), (6, 6, 6, 6), 0.0),
        ((5, 5, 5, 5), SQUARE, 0.0),
    ],
)
def test_overlap(first, second, expected):
    assert iou(first, second) == pytest.approx(expected, abs=1e-12)
    assert iou(second, first) == pytest.approx(expected, abs=1e-12)


def test_overlap_is_that_of_counted_pixels():
    draw = random.Random(1)
    for _ in range(100):
        first, second = (
            (x := draw.randrange(20), y := draw.randrange(20), x + draw.randrange(1, 12), y + 5)
            for _ in range(2)
        )
        canvas = np.zeros((2, 40, 40), dtype=bool)
        for layer, (x1, y1, x2, y2) in zip(canvas, (first, second), strict=True):
            layer[y1:y2, x1:x2] = True
        counted = (canvas[0] & canvas[1]).sum() / (canvas[0] | canvas[1]).sum()
        assert iou(first, second) == pytest.approx(counted, abs=1e-12)


def test_pairs_are_one_to_one_by_image_and_label():
    truth = [box(0, 0, 10, 10), box(20, 0, 30, 10, label="dog")]
    assert paired([box(0, 0, 10, 10), box(0, 0, 10, 10)], truth) == [1.0, 0.0]
    assert paired([box(20, 0, 30, 10)], truth) == [0.0, 0.0]  # a cat where the dog is
    assert paired([box(20, 0, 30, 10, label=" DOG ")], truth) == [0.0, 1.0]
    assert paired([box(20, 0, 30, 10, label="")], truth) == [0.0, 1.0]
    assert paired([box(0, 0, 10, 10, image=1)], truth) == [0.0, 0.0]
    assert paired([], truth) == [0.0, 0.0]
    assert paired(truth, []) == []


def test_the_largest_overlap_is_paired_first():
    """Greedy, as in the benchmarks: a better sum of worse pairs is not looked for."""
    truth = [box(0, 0, 10, 10), box(0, 4, 10, 14)]
    found = [box(0, 1, 10, 11), box(0, -4, 10, 6)]
    assert paired(found, truth) == pytest.approx([9 / 11, 1 / 9])
    assert paired(found[::-1], truth) == pytest.approx([9 / 11, 1 / 9])


@pytest.mark.parametrize(
    ("found", "truth", "overlap", "accuracy"),
    [
        ([box(*SQUARE)], [box(*SQUARE)], 1.0, 1.0),
        ([box(0, 0, 10, 5)], [box(*SQUARE)], 0.5, 1.0),  # 0.5 is found
        ([box(0, 0, 10, 4.9)], [box(*SQUARE)], 0.49, 0.0),
        ([], [box(*SQUARE)], 0.0, 0.0),
        ([box(*SQUARE), box(50, 50, 60, 60)], [box(*SQUARE)], 0.5, 1.0),  # one too many
        ([box(*SQUARE)], [box(*SQUARE), box(50, 50, 60, 60)], 0.5, 0.5),
        ([box(50, 50, 60, 60)], [box(*SQUARE)], 0.0, 0.0),
    ],
)
def test_rows(found, truth, overlap, accuracy):
    assert row_score(find("box_iou"), found, truth) == pytest.approx(overlap)
    assert row_score(find("box_accuracy_50"), found, truth) == pytest.approx(accuracy)


def test_a_row_without_any_box_is_right_and_weighs_nothing():
    metric = find("box_iou")
    rows = statistics(metric, [[], [box(*SQUARE)]], [[], [box(0, 0, 10, 5)]])
    assert metric.alone(rows) == pytest.approx([1.0, 0.5])
    assert value(metric, rows) == pytest.approx(0.5)
    # A box where there is none is an error, and counts as one.
    rows = statistics(metric, [[box(*SQUARE)], [box(*SQUARE)]], [[], [box(*SQUARE)]])
    assert value(metric, rows) == pytest.approx(0.5)
    assert share(np.zeros((3, 2))).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", NAMES)
def test_values_are_of_summed_statistics(name):
    """Resamples of rows are exact, as for every metric, and the truth is the best there is."""
    draw = random.Random(2)

    def some(count: int) -> list[Box]:
        corners = [sorted(draw.sample(range(40), 2)) for _ in range(2 * count)]
        pairs = zip(corners[::2], corners[1::2], strict=True)
        return [box(x1, y1, x2, y2, label=draw.choice("ab")) for (x1, x2), (y1, y2) in pairs]

    truth = [some(draw.randint(0, 3)) for _ in range(60)]
    found = [[*some(1), *each[:1]] for each in truth]
    metric = find(name)
    stats = statistics(metric, found, truth)
    counts = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=5)
    drawn = [row for row, times in enumerate(counts[2]) for _ in range(times)]
    again = statistics(metric, [found[row] for row in drawn], [truth[row] for row in drawn])
    expected = value(metric, again)
    assert metric.value(counts.astype(float), stats)[2] == pytest.approx(expected)
    assert value(metric, statistics(metric, truth, truth)) == 1.0
    interval = estimate(metric, stats)
    assert 0 <= interval.low < interval.value < interval.high <= 1


def test_rows_without_true_boxes_have_no_value():
    with pytest.raises(DataError) as caught:
        statistics(find("box_iou"), [[box(*SQUARE)], []], [[], []])
    assert caught.value.code == "no_boxes"


# Stored predictions and whole evaluations


def prediction(name: str, found: list[Box], truth: list[Box]) -> Prediction:
    return Prediction(name, "Where?", "…", ("…",), True, 9, 3, {}, tuple(found), tuple(truth))


def test_stored_predictions_can_be_scored_again(tmp_path):
    truth = [box(*SQUARE)]
    before = [prediction(str(n), [box(0, 0, 10, n)], truth) for n in range(10)]
    after = [prediction(str(n), [box(0, 0, 10, 10)], truth) for n in range(10)]
    evaluation = scored(before, NAMES, 64)
    assert evaluation.metrics["box_iou"].value == pytest.approx(0.45)
    assert evaluation.metrics["box_accuracy_50"].value == pytest.approx(0.5)
    assert evaluation.predictions[3].scores == {"box_iou": 0.3, "box_accuracy_50": 0.0}
    evaluation.write(tmp_path / "before")
    stored = Evaluation.read(tmp_path / "before")
    assert stored == evaluation
    assert scored(stored.predictions, NAMES, 64) == evaluation
    found = differences(NAMES, stored.predictions, after)
    assert found["box_iou"].value == pytest.approx(0.55)
    assert found["box_iou"].verdict == "better"


def test_predictions_of_earlier_versions_are_read(tmp_path):
    folder = tmp_path / "after"
    scored([prediction("0", [box(*SQUARE)], [box(*SQUARE)])], ["exact_match"], 64).write(folder)
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    old = [
        {key: value for key, value in json.loads(line).items() if key not in ("boxes", "truth")}
        for line in lines
    ]
    text = "".join(json.dumps(each) + "\n" for each in old)
    (folder / "predictions.jsonl").write_text(text, encoding="utf-8")
    (read,) = Evaluation.read(folder).predictions
    assert (read.boxes, read.truth) == ((), ())


@pytest.fixture(scope="module")
def rows() -> list[Conversation]:
    question = turn("user", 0, "Where is the cat?")
    corners = ((4.0, 4.0, 40.0, 40.0), (10.0, 0.0, 60.0, 30.0))
    return [
        Conversation(f"{n}", (question, turn("assistant", box(*xyxy))), (picture(seed=n),))
        for n, xyxy in enumerate(corners)
    ]


def test_an_evaluation_compares_boxes_in_pixels(rows, tiny_base: Path, monkeypatch):
    """The answers are what the labels say, so that everything is right; then moved by hand."""
    from vlmtune.evaluation import run
    from vlmtune.models.generate import Generation

    encoder, model = encoder_of(tiny_base, SMALL), lively(tiny_base)
    found = evaluate_rows(model, encoder, rows, NAMES, max_new_tokens=4)
    assert found.metrics["box_iou"].value == 0.0  # a random model finds nothing
    truth = [each.truth for each in found.predictions]
    assert truth == [tuple(row.messages[-1].content) for row in rows]
    # Of an answer of boxes, the text that the model would have to write.
    assert found.predictions[0].references[0].startswith("cat")
    assert "(" in found.predictions[0].references[0]

    def answers(moved: float):
        boxes = [
            replace(part, xyxy=(part.xyxy[0] + moved, *part.xyxy[1:]))
            for row in rows
            for part in row.messages[-1].content
        ]
        return lambda *_, **__: [Generation("…", (each,), 9, 3, True) for each in boxes]

    monkeypatch.setattr(run, "generate", answers(0.0))
    assert evaluate_rows(model, encoder, rows, NAMES).metrics["box_iou"].value == 1.0
    monkeypatch.setattr(run, "generate", answers(20.0))
    moved = evaluate_rows(model, encoder, rows, NAMES).metrics
    assert moved["box_iou"].value == pytest.approx((16 / 36 + 30 / 50) / 2)
    assert moved["box_accuracy_50"].value == 0.5


def test_rows_of_texts_are_refused_before_anything_is_asked(rows, tiny_base):
    answer = turn("assistant", "a cat")
    texts = [replace(row, messages=(*row.messages[:-1], answer)) for row in rows]
    with pytest.raises(UsageError, match="choose metrics of texts"):
        evaluate_rows(None, encoder_of(tiny_base, SMALL), texts, NAMES)  # type: ignore[arg-type]
