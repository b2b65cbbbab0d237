r"""Whether two formulas look alike, however they are spelled.

Both are drawn by the same program at the same size and cropped to their ink; blank columns between
inked ones are made two, however many they are. One is moved up or down to where the rows of ink
agree most, give or take two pixels. Then columns are paired, in order: two may pair if in the
strips of five columns around them at least 90 % of the ink of both has ink of the other within one
pixel above or below. The score is the ink of the paired columns that agrees so, as a share of all
ink of both; of the offsets and pairings, those that make it largest.

Equal pictures score 1, and so do those that differ in horizontal spacing alone. A glyph that is
wrong, missing or too many costs its own ink, and its neighbours' only where they touch.

Source: after the image edit distance of Deng et al., "Image-to-markup generation with
coarse-to-fine attention" (2017), arXiv 1609.04938, which compares columns for equality; here
columns count by their ink, and differ by a pixel without harm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmtune.errors import DataError
from vlmtune.evaluation.metric import Array, Details, Metric, RowStatistics, of_sums
from vlmtune.evaluation.rendering import Ink, ink

SHIFT = 1  # pixels up or down within which ink agrees
AROUND = 2  # columns on each side that must agree too
ALIKE = 0.9  # share of ink in the strips that must agree
NEAR = 2  # pixels around the best offset that are tried as well

_Float = NDArray[np.float32]


def agreement(first: Ink, second: Ink) -> float:
    """How far two cropped pictures agree, 0 to 1; see above."""
    first, second = _squeezed(first), _squeezed(second)
    if np.array_equal(first, second):
        return 1.0
    best = _offset(first, second)
    return max(
        _aligned(*_placed(first, second, best + near)) for near in range(-NEAR, NEAR + 1)
    ) / float(first.sum() + second.sum())


def _squeezed(picture: Ink) -> Ink:
    """The picture with gaps of ``AROUND`` columns, so that no strip reaches over one."""
    inked = np.flatnonzero(picture.any(axis=0))
    gaps = np.flatnonzero(np.diff(inked) > 1) + 1
    return np.insert(picture[:, inked], np.repeat(gaps, AROUND), False, axis=1)


def _offset(first: Ink, second: Ink) -> int:
    """How far down to move the second so that the rows' ink agrees most."""
    rows, others = (picture.sum(axis=1).astype(np.float64) for picture in (first, second))
    common = np.correlate(np.pad(rows, len(others) - 1), others, "valid")
    offsets = np.arange(len(common)) - (len(others) - 1)
    most = np.flatnonzero(common == common.max())
    return int(min(offsets[most], key=abs))


def _placed(first: Ink, second: Ink, offset: int) -> tuple[Ink, Ink]:
    """Both on canvases of one height, the second moved down."""
    top = max(0, -offset)
    height = max(len(first) + top, len(second) + offset + top)
    return (
        np.pad(first, ((top, height - len(first) - top), (0, 0))),
        np.pad(second, ((offset + top, height - len(second) - offset - top), (0, 0))),
    )


def _aligned(first: Ink, second: Ink) -> float:
    """The most ink that agrees in columns paired in order."""
    head, tail = _same_ends(first, second)
    certain = 2.0 * float(first[:, :head].sum() + first[:, first.shape[1] - tail :].sum())
    # The strips of the columns that are left reach into those that are settled.
    reach = slice(max(0, head - AROUND), None if tail <= AROUND else AROUND - tail)
    inner = tuple(
        (head - reach.start, picture.shape[1] - tail - reach.start) for picture in (first, second)
    )
    gains = _gains(first[:, reach], second[:, reach])[slice(*inner[0]), slice(*inner[1])]
    total = np.zeros(gains.shape[1] + 1, np.float32)
    for row in gains[gains.any(axis=1)]:
        paired = total.copy()
        np.maximum(paired[1:], total[:-1] + row, out=paired[1:])
        total = np.maximum.accumulate(paired)
    return certain + float(total[-1])


def _same_ends(first: Ink, second: Ink) -> tuple[int, int]:
    """Columns at the left and at the right that are equal in both, strips included."""
    most = min(first.shape[1], second.shape[1])
    differs = (first[:, :most] != second[:, :most]).any(axis=0)
    left = int(differs.argmax()) if differs.any() else most
    differs = (first[:, ::-1][:, :most] != second[:, ::-1][:, :most]).any(axis=0)
    right = int(differs.argmax()) if differs.any() else most
    head = max(0, left - AROUND)
    return head, min(max(0, right - AROUND), most - head)


def _gains(first: Ink, second: Ink) -> _Float:
    """Ink that agrees if two columns are paired, shape ``(columns, others)``; 0: they may not."""
    ours, theirs = (picture.T.astype(np.float32) for picture in (first, second))
    near_ours, near_theirs = (_blurred(picture).T.astype(np.float32) for picture in (first, second))
    common = ours @ near_theirs.T + near_ours @ theirs.T
    either = ours.sum(axis=1)[:, None] + theirs.sum(axis=1)[None]
    return np.where(_strips(common) >= ALIKE * _strips(either), common, np.float32(0))


def _strips(columns: _Float) -> _Float:
    """Sums along the diagonals, over ``AROUND`` columns on each side."""
    total = columns.copy()
    for step in range(1, AROUND + 1):
        total[step:, step:] += columns[:-step, :-step]
        total[:-step, :-step] += columns[step:, step:]
    return total


def _blurred(picture: Ink) -> Ink:
    """Ink, and what lies within ``SHIFT`` pixels above or below it."""
    near = picture.copy()
    for step in range(1, SHIFT + 1):
        near[step:] |= picture[:-step]
        near[:-step] |= picture[step:]
    return near


def _of_set(references: Sequence[Sequence[str]]) -> RowStatistics:
    if not any(ink(text) is not None for row in references for text in row):
        raise DataError(
            "nothing_renders",
            f"render_match draws formulas, and not one of the references of the {len(references)} "
            f"rows can be drawn (the first is {references[0][0]!r}); choose a metric of texts",
        )
    return _row


def _row(prediction: str, references: Sequence[str]) -> tuple[float, float, float]:
    """Score, whether the row counts, whether its prediction cannot be drawn."""
    truths = [truth for truth in map(ink, references) if truth is not None]
    if not truths:
        return 0.0, 0.0, 0.0
    said = ink(prediction)
    if said is None:
        return 0.0, 1.0, 1.0
    return max(agreement(said, truth) for truth in truths), 1.0, 0.0


def _share(sums: Array) -> Array:
    # Drawn rows that all have no picture of the truth score nothing.
    return np.asarray(sums[..., 0] / np.maximum(sums[..., 1], 1.0))


def _alone(stats: Array) -> Array:
    return np.where(stats[:, 1] > 0, stats[:, 0], math.nan)


def _counts(
    predictions: Sequence[str], references: Sequence[Sequence[str]], stats: Array
) -> dict[str, Any]:
    """Rows that count, rows left out, and predictions that count 0 for having no picture."""
    del predictions, references
    return {
        "rows": int(stats[:, 1].sum()),
        "truth_not_rendered": int((stats[:, 1] == 0).sum()),
        "prediction_not_rendered": int(stats[:, 2].sum()),
    }


def _words(details: Mapping[str, Any]) -> str:
    return (
        f"{details['prediction_not_rendered']} of {details['rows']} predictions cannot be drawn "
        f"and count 0; {details['truth_not_rendered']} rows whose truth cannot are left out"
    )


RENDER_MATCH = Metric(
    name="render_match",
    range=(0.0, 1.0),
    higher_is_better=True,
    meaning="ink that agrees between the pictures of formula and truth, mean over rows",
    source="after Deng et al. (2017), arXiv 1609.04938, image edit distance over columns",
    of_set=_of_set,
    value=of_sums(_share),
    alone=_alone,
    verbatim=True,
    details=Details(_counts, _words),
)
