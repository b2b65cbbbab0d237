"""Average precision against pycocotools."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Sequence

import numpy as np
import pytest

from vlmtune.data.conversation import Box
from vlmtune.errors import DataError
from vlmtune.evaluation.detection import DETECTION_METRICS, THRESHOLDS
from vlmtune.evaluation.intervals import compare, estimate
from vlmtune.evaluation.metric import row_score, statistics, value
from vlmtune.evaluation.metrics import find

NAMES = [metric.name for metric in DETECTION_METRICS]
Rows = list[list[Box]]


def box(x1: float, y1: float, x2: float, y2: float, label: str = "cat", image: int = 0) -> Box:
    return Box(image, label, (float(x1), float(y1), float(x2), float(y2)))


def score(name: str, found: Sequence[Sequence[Box]], truth: Sequence[Sequence[Box]]) -> float:
    return value(find(name), statistics(find(name), found, truth))


def scene(seed: int, rows: int = 25) -> tuple[Rows, Rows]:
    """Boxes of three classes, and answers that move, forget, rename and invent some."""
    draw = random.Random(seed)

    def corners() -> tuple[float, float, float, float]:
        x1, y1 = draw.randint(0, 60), draw.randint(0, 60)
        return x1, y1, x1 + draw.randint(8, 40), y1 + draw.randint(8, 40)

    truth = [
        [box(*corners(), label=draw.choice("abc")) for _ in range(draw.randint(0, 4))]
        for _ in range(rows)
    ]
    found = []
    for row in truth:
        kept = [
            box(*(edge + draw.randint(-3, 3) for edge in each.xyxy), label=each.label)
            for each in row
            if draw.random() < 0.8
        ]
        kept += [box(*corners(), label=draw.choice("abcd")) for _ in range(draw.randint(0, 2))]
        draw.shuffle(kept)
        found.append(kept)
    return found, truth


def coco(found: Sequence[Sequence[Box]], truth: Sequence[Sequence[Box]], threshold: float) -> float:
    """What pycocotools says at one threshold, a row being an image.

    The score is the rank. Of boxes of equal rank in different images the wrong ones come first,
    which takes two passes: the first says which are wrong.
    """
    api = pytest.importorskip("pycocotools.coco")
    evaluator = pytest.importorskip("pycocotools.cocoeval")
    names = sorted({each.label for row in truth for each in row})
    annotations = [
        {
            "id": number,
            "image_id": row,
            "category_id": names.index(each.label),
            "bbox": wide(each),
            "area": wide(each)[2] * wide(each)[3],
            "iscrowd": 0,
        }
        for number, (row, each) in enumerate(
            ((row, each) for row, boxes in enumerate(truth) for each in boxes), start=1
        )
    ]
    results = [
        {
            "image_id": row,
            "category_id": names.index(each.label),
            "bbox": wide(each),
            "score": -10.0 * rank,
        }
        for row, boxes in enumerate(found)
        for rank, each in enumerate(boxes)
        if each.label in names
    ]
    dataset = {
        "images": [{"id": row} for row in range(len(truth))],
        "annotations": annotations,
        "categories": [{"id": number} for number in range(len(names))],
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        real = api.COCO()
        real.dataset = dataset
        real.createIndex()
        for _ in range(2):
            evaluation = evaluator.COCOeval(
                real, real.loadRes([dict(each) for each in results]), "bbox"
            )
            evaluation.params.iouThrs = np.array([threshold])
            evaluation.evaluate()
            right = {
                number
                for image in evaluation.evalImgs
                if image is not None
                for number, match in zip(image["dtIds"], image["dtMatches"][0], strict=True)
                if match
            }
            for number, each in enumerate(results, start=1):
                each["score"] -= number in right  # among equals, behind the wrong ones
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, -1]  # (recalls, classes), all areas
    return float(np.mean(precision[precision > -1]))


def wide(each: Box) -> list[float]:
    x1, y1, x2, y2 = each.xyxy
    return [x1, y1, x2 - x1, y2 - y1]


@pytest.mark.parametrize("seed", range(6))
def test_it_is_pycocotools_s(seed):
    found, truth = scene(seed)
    at_half = coco(found, truth, 0.5)
    assert score("average_precision_50", found, truth) == pytest.approx(at_half, abs=1e-9)
    everywhere = np.mean([coco(found, truth, threshold) for threshold in THRESHOLDS])
    assert score("average_precision", found, truth) == pytest.approx(everywhere, abs=1e-9)
    # Negative control: rank matters, and so does where the boxes are.
    backwards = [row[::-1] for row in found]
    assert score("average_precision_50", backwards, truth) != pytest.approx(at_half, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_rows_does_not_matter(name):
    found, truth = scene(7)
    order = random.Random(0).sample(range(len(truth)), len(truth))
    shuffled = score(name, [found[row] for row in order], [truth[row] for row in order])
    assert shuffled == pytest.approx(score(name, found, truth), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_resampled_rows_are_counted_exactly(name):
    found, truth = scene(8, rows=40)
    metric = find(name)
    stats = statistics(metric, found, truth)
    counts = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), size=(2, 3))
    values = metric.value(counts.astype(float), stats)
    assert values.shape == (2, 3)
    drawn = [row for row, times in enumerate(counts[1, 2]) for _ in range(times)]
    again = score(name, [found[row] for row in drawn], [truth[row] for row in drawn])
    assert values[1, 2] == pytest.approx(again, abs=1e-12)
    interval = estimate(metric, stats)
    assert 0 < interval.low < interval.value < interval.high < 1


@pytest.mark.parametrize("name", NAMES)
def test_plain_cases(name):
    here, there = box(0, 0, 10, 10), box(50, 50, 60, 60)
    assert score(name, [[here, there]], [[here, there]]) == pytest.approx(1.0)
    assert score(name, [[]], [[here]]) == 0.0
    assert score(name, [[there]], [[here]]) == 0.0
    # A wrong box before the right one halves the precision; behind it costs nothing.
    assert score(name, [[there, here]], [[here]]) == pytest.approx(0.5)
    assert score(name, [[here, there]], [[here]]) == pytest.approx(1.0)
    # Half of what there is, and nothing wrong: the readings up to a recall of a half.
    assert score(name, [[here]], [[here, there]]) == pytest.approx(51 / 101)


def test_classes_are_averaged_and_unknown_ones_left_out():
    here, there = box(0, 0, 10, 10, "cat"), box(50, 50, 60, 60, "dog")
    assert score("average_precision_50", [[here]], [[here, there]]) == pytest.approx(0.5)
    invented = box(0, 0, 10, 10, "fox")
    assert score("average_precision_50", [[invented, here]], [[here]]) == pytest.approx(1.0)
    renamed = box(50, 50, 60, 60, " CAT ")
    assert score("average_precision_50", [[here, renamed]], [[here, there]]) == pytest.approx(0.5)


def test_a_label_that_is_missing_is_the_only_one_there_is():
    here, bare = box(0, 0, 10, 10, "cat"), box(0, 0, 10, 10, "")
    assert score("average_precision_50", [[bare]], [[here]]) == pytest.approx(1.0)
    assert score("average_precision_50", [[here]], [[bare]]) == pytest.approx(1.0)
    other = box(0, 0, 10, 10, "dog")
    assert score("average_precision_50", [[other]], [[here]]) == 0.0
    assert score("average_precision_50", [[bare]], [[here, other]]) == 0.0


def test_pictures_of_a_row_are_apart():
    here = box(0, 0, 10, 10)
    assert score("average_precision_50", [[box(0, 0, 10, 10, image=1)]], [[here]]) == 0.0


def test_rows_alone():
    here = box(0, 0, 10, 10)
    metric = find("average_precision")
    assert row_score(metric, [here], [here]) == pytest.approx(1.0)
    stats = statistics(metric, [[here], [here]], [[here], []])
    assert metric.alone(stats)[0] == pytest.approx(1.0)
    assert np.isnan(metric.alone(stats)[1])  # a row without a true box has no value of its own
    # Yet its box counts: of two boxes of rank one, one is right.
    assert value(metric, stats) == pytest.approx(0.5)
    with pytest.raises(DataError) as caught:
        statistics(metric, [[here]], [[]])
    assert caught.value.code == "no_boxes"


def test_answers_of_unlike_length_can_be_compared():
    found, truth = scene(9, rows=60)
    metric = find("average_precision")
    first = statistics(metric, [row[:1] for row in found], truth)
    second = statistics(metric, truth, truth)
    assert first.shape != second.shape
    assert compare(metric, first, second, seed=0).verdict == "better"
    assert compare(metric, second, second, seed=0).changed == 0
