"""Average precision of detection, as COCO's evaluation counts it.

Answers hold no scores: the order of a row's boxes is their rank. Boxes of the same rank in other
rows come in together, so that the order of the rows does not matter; pycocotools, which takes equal
scores one after the other, gives the same where of equal ones the wrong come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from vlmtune.data.conversation import Box
from vlmtune.evaluation.box_metrics import iou
from vlmtune.evaluation.metric import PADDING, Array, Metric, RowStatistics

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU, from which a box is right
RECALLS = np.linspace(0.0, 1.0, 101)  # where precision is read
MOST = 100  # boxes of a class in a picture; COCO's limit
TRUE = 0.0  # the rank of true boxes


def detections(truth: Sequence[Sequence[Box]]) -> RowStatistics:
    """Of a row: three numbers for each true box and each box found, one after the other.

    They are class, rank (0 for a true box) and the thresholds at which a found box is right, as the
    bits of a number. Boxes of a class that no row has are left out, as by COCO.
    """
    names = sorted({_name(box) for row in truth for box in row})
    numbers = {name: number for number, name in enumerate(names)}

    def read(found: Sequence[Box], real: Sequence[Box]) -> tuple[float, ...]:
        only = {_name(box) for box in real}
        records = [(numbers[_name(box)], TRUE, 0) for box in real]
        groups: dict[tuple[int, str], list[tuple[int, Box]]] = {}
        for rank, box in enumerate(found, start=1):
            name = _name(box)
            if len(only) == 1 and not (name and all(only)):
                (name,) = only  # a label is missing, and there is only one that it can be
            if name in numbers:
                groups.setdefault((box.image, name), []).append((rank, box))
        for (image, name), ranked in groups.items():
            own = [box for box in real if (box.image, _name(box)) == (image, name)]
            boxes = [box for _, box in ranked[:MOST]]
            hits = _hits(boxes, own)
            records += [
                (numbers[name], rank, bits) for (rank, _), bits in zip(ranked, hits, strict=False)
            ]
        return tuple(float(number) for record in records for number in record)

    return read


def average_precision(counts: Array, stats: Array, *, thresholds: int) -> Array:
    """Mean over the first thresholds, and over the classes that the drawn rows have.

    Args:
        counts: How often each row counts, shape ``(..., rows)``.
        stats: What ``detections`` gives of each row, shape ``(rows, 3 * boxes)``.
        thresholds: How many of ``THRESHOLDS``.
    """
    records = stats.reshape(len(stats), -1, 3)
    row, place = np.nonzero(records[..., 0] != PADDING)
    kind, rank, bits = records[row, place].T
    times = counts.reshape(-1, len(stats))
    total, classes = np.zeros(len(times)), np.zeros(len(times))
    for each in np.unique(kind[rank == TRUE]):
        own = kind == each
        truth = times[:, row[own & (rank == TRUE)]].sum(axis=1)
        found = np.flatnonzero(own & (rank != TRUE))
        found = found[np.argsort(rank[found], kind="stable")]
        hits = (bits[found].astype(np.int64)[:, None] >> np.arange(thresholds)) & 1
        total += _of_class(times[:, row[found]], rank[found], hits, truth)
        classes += truth > 0
    values = np.where(classes > 0, total / np.maximum(classes, 1), 0.0)
    return values.reshape(counts.shape[:-1])


def _of_class(times: Array, rank: Array, hits: NDArray[np.int64], truth: Array) -> Array:
    """Mean over thresholds of one class's average precision, shape ``(draws,)``.

    Args:
        times: How often each found box counts, best rank first, shape ``(draws, boxes)``.
        rank: Of each found box, rising.
        hits: Whether it is right, shape ``(boxes, thresholds)``.
        truth: How many true boxes there are, shape ``(draws,)``.
    """
    if not len(rank):
        return np.zeros(len(times))
    starts = np.flatnonzero(np.diff(rank, prepend=TRUE))
    named = np.add.reduceat(times, starts, axis=1).cumsum(axis=1)
    value = np.zeros(len(times))
    # Most boxes are right at the same thresholds: each pattern is worked out once.
    patterns, alike = np.unique(hits, axis=1, return_counts=True)
    for pattern, share in zip(patterns.T, alike / hits.shape[1], strict=True):
        right = np.add.reduceat(times * pattern, starts, axis=1).cumsum(axis=1)
        precision = right / np.maximum(named, 1.0)
        recall = right / np.maximum(truth, 1.0)[:, None]
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # Each reading is taken at the first rank whose recall is as high.
        readings = np.searchsorted(RECALLS, recall, side="right")
        steps = np.diff(readings, axis=1, prepend=0)
        value += share * (best * steps).sum(axis=1) / len(RECALLS)
    return np.where(truth > 0, value, 0.0)


def _alone(stats: Array, *, thresholds: int) -> Array:
    """Of each row by itself; NaN where it has no true box."""
    one = np.ones(1)
    has_truth = (stats[:, 1::3] == TRUE).any(axis=1)
    return np.array(
        [
            average_precision(one, row[None], thresholds=thresholds) if real else np.nan
            for row, real in zip(stats, has_truth, strict=True)
        ],
        np.float64,
    )


def _hits(found: Sequence[Box], real: Sequence[Box]) -> list[int]:
    """For each found box, best rank first, the bits of the thresholds at which it is right.

    A true box is taken once, by the first that overlaps it enough; a found box takes the one that
    it overlaps most.
    """
    overlaps = [[iou(box.xyxy, other.xyxy) for other in real] for box in found]
    bits = [0] * len(found)
    for place, threshold in enumerate(THRESHOLDS):
        free = set(range(len(real)))
        for number, row in enumerate(overlaps):
            best = max(free, key=lambda other: (row[other], other), default=None)
            if best is not None and row[best] >= threshold:
                free.remove(best)
                bits[number] |= 1 << place
    return bits


def _name(box: Box) -> str:
    return " ".join(box.label.casefold().split())


def _metric(name: str, thresholds: int, meaning: str) -> Metric:
    return Metric(
        name=name,
        range=(0.0, 1.0),
        higher_is_better=True,
        meaning=meaning,
        source="Lin et al. (2014), COCO; pycocotools' COCOeval, order of appearance for a score",
        of_set=detections,
        value=partial(average_precision, thresholds=thresholds),
        alone=partial(_alone, thresholds=thresholds),
        boxes=True,
    )


DETECTION_METRICS = (
    _metric(
        "average_precision",
        len(THRESHOLDS),
        "area under precision and recall, mean over IoU .5 to .95 and over classes",
    ),
    _metric(
        "average_precision_50",
        1,
        "area under precision and recall at IoU .5, mean over classes",
    ),
)
