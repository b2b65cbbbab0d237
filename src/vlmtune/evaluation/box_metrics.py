"""How well boxes are found: pure functions of one row's boxes, in pixels of the upright image.

Found and true boxes are paired one to one, greedily: of all pairs on the same image with the same
label (case and spacing aside; a box without a label goes with any), the one that overlaps most is
taken first. Ties go to the true box, then to the found box, that stands first in its answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlmtune.data.boxes import Corners
from vlmtune.data.conversation import Box
from vlmtune.evaluation.metric import Metric, of_row, of_sums

FOUND_FROM = 0.5  # IoU from which a box counts as found


def iou(first: Corners, second: Corners) -> float:
    """Intersection over union of two boxes ``(x1, y1, x2, y2)``, 0 to 1.

    Boxes without an area overlap nothing but their like.

    Source: Jaccard (1912); Everingham et al., "The PASCAL visual object classes challenge" (2010).
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(width, 0.0) * max(height, 0.0)
    either = _area(first) + _area(second) - both
    return both / either if either > 0 else float(tuple(first) == tuple(second))


def paired(found: Sequence[Box], truth: Sequence[Box]) -> list[float]:
    """The IoU of each true box with the found box that is paired with it; 0 where there is none."""
    overlaps = [
        (iou(box.xyxy, real.xyxy), number, index)
        for number, real in enumerate(truth)
        for index, box in enumerate(found)
        if box.image == real.image and _may_be(box.label, real.label)
    ]
    best = [0.0] * len(truth)
    taken: set[int] = set()
    for overlap, number, index in sorted(overlaps, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if overlap > 0 and index not in taken and not best[number]:
            best[number] = overlap
            taken.add(index)
    return best


def iou_statistics(found: Sequence[Box], truth: Sequence[Box]) -> tuple[float, float]:
    """Overlaps of the pairs, and as many boxes as there are or were named, whichever is more.

    So a box too many counts as much as one too few, and naming many boxes does not pay; with one
    box a row it is the mean overlap that is usual for referring expressions.
    """
    return sum(paired(found, truth)), float(max(len(found), len(truth)))


def found_statistics(found: Sequence[Box], truth: Sequence[Box]) -> tuple[float, float]:
    """True boxes that were found, and true boxes."""
    hits = sum(overlap >= FOUND_FROM for overlap in paired(found, truth))
    return float(hits), float(len(truth))


def share(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Summed statistics to values, shape ``(..., 2) -> (...)``; 1 where there was no box at all."""
    none = sums[..., 1] == 0
    return np.where(none, 1.0, sums[..., 0] / np.where(none, 1.0, sums[..., 1]))


def _area(box: Corners) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _may_be(found: str, real: str) -> bool:
    first, second = found.casefold().split(), real.casefold().split()
    return not first or not second or first == second


BOX_METRICS = (
    Metric(
        name="box_iou",
        range=(0.0, 1.0),
        higher_is_better=True,
        meaning="mean overlap (IoU) of true and found boxes; one missing or too many is 0",
        source="Everingham et al. (2010), overlap; pairs greedily by label and IoU",
        of_set=of_row(iou_statistics),
        value=of_sums(share),
        alone=share,
        boxes=True,
    ),
    Metric(
        name="box_accuracy_50",
        range=(0.0, 1.0),
        higher_is_better=True,
        meaning="share of true boxes that were found with an overlap (IoU) of at least 0.5",
        source="RefCOCO's accuracy at 0.5 (Yu et al., 2016), for any number of boxes a row",
        of_set=of_row(found_statistics),
        value=of_sums(share),
        alone=share,
        boxes=True,
    ),
)
