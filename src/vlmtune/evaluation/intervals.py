"""How sure a measured value is: bootstrap intervals, and paired comparison of two models' answers.

All functions are deterministic in their seed. The same seed draws the same rows for every metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from vlmtune.errors import DataError
from vlmtune.evaluation.metric import PADDING, Array, Combine, Metric, statistics
from vlmtune.evaluation.metric import value as value_of
from vlmtune.evaluation.metrics import find

Verdict = Literal["better", "worse", "none"]

# A sign test on fewer rows that changed cannot reach 5 % whatever they say: 2 * 0.5**5 > 0.05.
FEWEST_CHANGED = 6
NOISE = 1e-12  # of rounding, where sums that are equal were added in another order
GROUPS = 500  # for a jackknife; the rows of a group pull together as they would one by one
SMALLEST = 1e-3
_CHUNK = 4_000_000  # resampling counts held at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its interval, ``low <= value <= high``, in the metric's range."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """What changed from before to after, on the same rows.

    Attributes:
        value: After minus before, in the metric's unit.
        low: Lower end of the interval.
        high: Upper end of the interval.
        probability: Share of resamples in which after is better (a tie counts half), 0..1.
        changed: Rows whose statistics differ at all.
    """

    value: float
    low: float
    high: float
    probability: float
    changed: int

    @property
    def verdict(self) -> Verdict:
        """What may be claimed; fewer than six changed rows support no claim at all."""
        if self.changed < FEWEST_CHANGED or self.low <= 0.0 <= self.high:
            return "none"
        return "better" if self.probability > 0.5 else "worse"


def wilson(successes: float, rows: int, *, confidence: float = 0.95) -> Estimate:
    """Interval of a proportion; 0 of n is not [0, 0].

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    Args:
        successes: Rows that count, 0..rows.
        rows: All rows, at least 1.
        confidence: Share of intervals that hold the truth, in (0, 1).
    """
    if rows < 1:
        raise _no_rows("a proportion")
    z = _quantile(confidence)
    share = successes / rows
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * math.sqrt(share * (1 - share) / rows + (z / (2 * rows)) ** 2) / (1 + z * z / rows)
    # At 0 and at 1 the end is exact; rounding must not put the value outside its own interval.
    low, high = min(share, centre - half), max(share, centre + half)
    return Estimate(share, max(0.0, low), min(1.0, high))


def bootstrap(
    metric: Metric, stats: Array, *, seed: int, resamples: int = 1000, confidence: float = 0.95
) -> Estimate:
    """Bootstrap over rows, corrected for bias and skewness, and widened for few rows.

    Without the correction a mean near its ceiling would be claimed too high: few rows are wrong,
    and a sample that misses some of them looks surer than it is. Rows that are all alike say
    nothing about rows not seen; there the interval allows for as many different rows as Wilson's.

    Source: Efron, "Better bootstrap confidence intervals" (1987), BCa; widened after Hesterberg,
    "What teachers should know about the bootstrap" (2015), section 4.

    Args:
        metric: Whose statistics these are.
        stats: Sufficient statistics, shape ``(rows, k)``.
        seed: Of the resampling.
        resamples: How often the rows are drawn anew.
        confidence: Share of intervals that hold the truth, in (0, 1).

    Raises:
        DataError: With code ``no_rows``.
    """
    rows = len(stats)
    if rows == 0:
        raise _no_rows(metric.name)
    value = value_of(metric, stats)

    def of(counts: Array) -> Array:
        return metric.value(counts, stats)

    drawn = _drawn(of, rows, resamples, seed)
    low, high = _interval(of, drawn, value, confidence, metric.range, rows)
    return Estimate(value, low, high)


def compare(
    metric: Metric,
    before: Array,
    after: Array,
    *,
    seed: int,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Difference:
    """Paired bootstrap: both models are judged on the same drawn rows, so row difficulty cancels.

    Source: Koehn, "Statistical significance tests for machine translation evaluation" (2004).

    Args:
        metric: Whose statistics these are.
        before: Statistics of the model before, shape ``(rows, k)``.
        after: Statistics of the model after, the same rows in the same order.
        seed: Of the resampling.
        resamples: How often the rows are drawn anew.
        confidence: Share of intervals that hold the truth, in (0, 1).

    Raises:
        DataError: With code ``no_rows`` or ``rows_differ``.
    """
    if len(before) != len(after):
        raise DataError(
            "rows_differ",
            f"before has {len(before)} rows and after has {len(after)}; a paired comparison needs "
            "the same rows in the same order",
        )
    rows = len(before)
    if rows == 0:
        raise _no_rows(metric.name)
    first, second = value_of(metric, before), value_of(metric, after)

    def of(counts: Array) -> Array:
        return metric.value(counts, after) - metric.value(counts, before)

    drawn = _drawn(of, rows, resamples, seed)
    reach = metric.range[1] - metric.range[0]
    low, high = _interval(of, drawn, second - first, confidence, (-reach, reach), rows)
    gains = np.where(np.abs(drawn) <= NOISE, 0.0, drawn if metric.higher_is_better else -drawn)
    return Difference(
        value=second - first,
        low=low,
        high=high,
        probability=float(np.mean(gains > 0) + np.mean(gains == 0) / 2),
        changed=_changed(before, after),
    )


def score(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Every named metric of texts with its 95 % interval.

    Wilson's for proportions, else the bootstrap's.

    Raises:
        UsageError: For an unknown metric.
        DataError: With code ``no_rows``, ``rows_differ`` or ``no_references``.
    """
    return {
        metric.name: estimate(metric, statistics(metric, predictions, references), seed=seed)
        for metric in [find(name) for name in names]
    }


def estimate(metric: Metric, stats: Array, *, seed: int = 0) -> Estimate:
    """A metric with its 95 % interval, from the rows' statistics, shape ``(rows, k)``."""
    if metric.proportion:
        return wilson(float(stats[:, 0].sum()), len(stats))
    return bootstrap(metric, stats, seed=seed)


def score_differences(
    names: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    seed: int = 0,
) -> dict[str, Difference]:
    """Every named metric of texts compared between two lists of predictions for the same rows."""
    return {
        metric.name: compare(
            metric,
            statistics(metric, before, references),
            statistics(metric, after, references),
            seed=seed,
        )
        for metric in [find(name) for name in names]
    }


def _changed(before: Array, after: Array) -> int:
    """Rows whose numbers differ; a row of fewer numbers is padded."""
    width = max(before.shape[1], after.shape[1])
    first, second = (
        np.pad(stats, ((0, 0), (0, width - stats.shape[1])), constant_values=PADDING)
        for stats in (before, after)
    )
    return int(np.any(first != second, axis=1).sum())


def _drawn(of: Combine, rows: int, resamples: int, seed: int) -> Array:
    """Values of resampled rows, shape ``(resamples,)``."""
    return np.concatenate([of(counts) for counts in _draws(rows, resamples, seed)])


def _draws(rows: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each row is drawn, shape ``(resamples, rows)``, cut to bound memory."""
    generator = np.random.default_rng(seed)
    size = max(1, _CHUNK // rows)
    for start in range(0, resamples, size):
        times = min(size, resamples - start)
        # A multinomial, drawn four times faster: each resample counts in its own stretch of rows.
        drawn = generator.integers(rows, size=(times, rows)) + rows * np.arange(times)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=times * rows).reshape(times, rows)
        yield counts.astype(np.float64)


def _interval(
    of: Combine,
    drawn: Array,
    value: float,
    confidence: float,
    bounds: tuple[float, float],
    rows: int,
) -> tuple[float, float]:
    """Both ends, within the bounds, with the value between them.

    Args:
        of: How often rows count, shape ``(..., rows)``, to values.
        drawn: Values of resampled rows.
        value: That of all rows.
        confidence: Share of intervals that hold the truth.
        bounds: Smallest and largest possible value.
        rows: How many there are.
    """
    smallest, largest = bounds
    if np.ptp(drawn) <= NOISE:
        unseen = wilson(0, rows, confidence=confidence).high
        # Where the range is infinite: one error a unit, or as measured.
        reach = max(1.0, abs(value))
        low = value - unseen * (value - max(smallest, -reach))
        high = value + unseen * (min(largest, reach) - value)
    else:
        ends = np.quantile(drawn, _ranks(drawn, value, _acceleration(of, rows), confidence))
        widen = _student(confidence, rows - 1) / _quantile(confidence) * (rows / (rows - 1)) ** 0.5
        low, high = (value + widen * (float(end) - value) for end in ends)
    return max(smallest, min(low, value)), min(largest, max(high, value))


def _ranks(
    drawn: Array, value: float, acceleration: float, confidence: float
) -> tuple[float, float]:
    """Which shares of the resamples lie below both ends: BCa's."""
    normal = NormalDist()
    below = float(np.mean(drawn < value - NOISE) + np.mean(drawn <= value + NOISE)) / 2
    bias = normal.inv_cdf(min(max(below, 1 / len(drawn)), 1 - 1 / len(drawn)))
    z = _quantile(confidence)
    low, high = (
        normal.cdf(bias + (bias + end) / max(1 - acceleration * (bias + end), SMALLEST))
        for end in (-z, z)
    )
    return low, high


def _acceleration(of: Combine, rows: int) -> float:
    """Skewness of what the rows contribute, by leaving out each, or each of ``GROUPS`` groups."""
    groups = min(rows, GROUPS)
    kept = np.arange(rows)[None] % groups != np.arange(groups)[:, None]
    values = of(kept.astype(np.float64))
    pulls = values.mean() - values
    spread = float(np.sum(pulls**2))
    return float(np.sum(pulls**3)) / (6 * spread**1.5) if spread > NOISE**2 else 0.0


def _quantile(confidence: float) -> float:
    """Two-sided normal quantile: 1.96 for 0.95."""
    return NormalDist().inv_cdf(0.5 + confidence / 2.0)


def _student(confidence: float, freedom: int) -> float:
    """Two-sided Student quantile by Cornish and Fisher's series.

    Source: Abramowitz and Stegun, "Handbook of mathematical functions" (1964), 26.7.5. Too small by
    less than 1 % from 3 degrees of freedom on at 0.95, by 24 % at one.
    """
    z = _quantile(confidence)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def _no_rows(of: str) -> DataError:
    return DataError(
        "no_rows", f"{of} of 0 rows has no value and no interval; expected at least one row"
    )
