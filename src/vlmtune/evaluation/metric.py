"""What a metric is: each row becomes a few numbers, and rows drawn so often each become a value.

Most metrics are functions of sums over rows, so that a corpus metric (BLEU, character error rate)
is resampled as exactly as a mean: ``combine(counts @ statistics)`` is the metric of the drawn rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmtune.errors import DataError

Array = NDArray[np.float64]
Combine = Callable[[Array], Array]
# Of what a model said in a row, and what is accepted: a text and texts, or boxes and boxes.
RowStatistics = Callable[[Any, Sequence[Any]], tuple[float, ...]]
PADDING = -1.0  # where rows have numbers of unlike length


@dataclass(frozen=True, slots=True)
class Details:
    """What there is to say beside the value.

    Attributes:
        of: Predictions, references and statistics to a JSON object.
        words: That object in one line for people; empty if there is nothing to say.
    """

    of: Callable[[Sequence[Any], Sequence[Sequence[Any]], Array], dict[str, Any]]
    words: Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A measure of how well predictions match their references.

    Attributes:
        name: As it is asked for on the command line.
        range: Smallest and largest possible value.
        higher_is_better: Direction of improvement.
        meaning: What the value says, in one line for people.
        source: Paper or file the definition comes from.
        of_set: From the references of all rows, the function of one row: ``(prediction,
            references) -> numbers``; references are not empty. With ``boxes``: ``(boxes found,
            true boxes) -> numbers``. Resampled rows keep the function of the whole set.
        value: How often each row counts ``(..., rows)`` and the rows' numbers ``(rows, k)`` to
            values ``(...)``.
        alone: The rows' numbers ``(rows, k)`` to the value of each by itself ``(rows,)``; NaN
            where the metric says nothing about a row.
        proportion: Whether a row counts (0 or 1, 1), so that the value is a share of rows.
        boxes: Whether it compares boxes instead of texts.
        verbatim: Whether texts are taken as they are, whatever normalisation is asked for.
        details: What there is to say beside the value.
    """

    name: str
    range: tuple[float, float]
    higher_is_better: bool
    meaning: str
    source: str
    of_set: Callable[[Sequence[Sequence[Any]]], RowStatistics]
    value: Callable[[Array, Array], Array]
    alone: Callable[[Array], Array]
    proportion: bool = False
    boxes: bool = False
    verbatim: bool = False
    details: Details | None = None


def of_row(row: RowStatistics) -> Callable[[Sequence[Sequence[Any]]], RowStatistics]:
    """For metrics whose rows need not know of each other."""
    return lambda _: row


def of_sums(combine: Combine) -> Callable[[Array, Array], Array]:
    """For metrics that are functions of sums over rows, ``(..., k) -> (...)``."""
    return lambda counts, stats: combine(counts @ stats)


def mean(sums: Array) -> Array:
    """Sum and number to the mean, shape ``(..., 2) -> (...)``."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def mean_of(
    name: str,
    score: Callable[[str, Sequence[str]], float],
    meaning: str,
    source: str,
    *,
    proportion: bool = False,
) -> Metric:
    """A metric that is the mean over rows of a score in 0..1, higher being better."""
    return Metric(
        name=name,
        range=(0.0, 1.0),
        higher_is_better=True,
        meaning=meaning,
        source=source,
        of_set=of_row(lambda prediction, references: (score(prediction, references), 1.0)),
        value=of_sums(mean),
        alone=mean,
        proportion=proportion,
    )


def statistics(
    metric: Metric, predictions: Sequence[Any], references: Sequence[Sequence[Any]]
) -> Array:
    """The numbers of every row, shape ``(rows, k)``.

    Args:
        metric: Whose.
        predictions: A text a row, or the boxes found in it.
        references: All acceptable texts of a row, or its true boxes.

    Raises:
        DataError: With code ``no_rows``, ``rows_differ`` (not as many references as predictions),
            ``no_references`` (a row without any), ``no_boxes`` (no row has a true box), or that of
            a metric which says nothing about any of the rows.
    """
    if not predictions and not references:
        raise DataError("no_rows", f"{metric.name} of 0 rows has no value; expected at least one")
    if len(predictions) != len(references):
        raise DataError(
            "rows_differ",
            f"{len(predictions)} predictions stand beside {len(references)} lists of references; "
            "expected one list a prediction",
        )
    row = row_statistics(metric, references)
    rows = [row(said, accepted) for said, accepted in zip(predictions, references, strict=True)]
    longest = max(map(len, rows))
    return np.array([(*each, *(PADDING,) * (longest - len(each))) for each in rows], np.float64)


def row_statistics(metric: Metric, references: Sequence[Sequence[Any]]) -> RowStatistics:
    """The function of one row, after the references were found fit; see ``statistics``."""
    if metric.boxes and not any(references):
        raise DataError(
            "no_boxes",
            f"{metric.name} compares boxes, and the answer of none of the {len(references)} rows "
            "holds one; choose a metric of texts",
        )
    for row, acceptable in enumerate(() if metric.boxes else references):
        if not acceptable or isinstance(acceptable, str):
            raise DataError(
                "no_references",
                f"row {row} (counted from 0) has {acceptable!r} as references; expected a list of "
                "at least one acceptable answer",
            )
    return metric.of_set(references)


def value(metric: Metric, stats: Array) -> float:
    """The metric of all rows, from their statistics, shape ``(rows, k)``."""
    return float(metric.value(np.ones(len(stats)), stats))


def row_score(metric: Metric, prediction: Any, references: Sequence[Any]) -> float:
    """Value of one row as if it were the whole set, in the metric's range.

    Raises:
        DataError: With code ``no_references`` if there is nothing to compare with.
    """
    return float(metric.alone(statistics(metric, [prediction], [references]))[0])
