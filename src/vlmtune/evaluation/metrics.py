r"""Metrics as pure functions: a row becomes sufficient statistics, their sums become a value.

Because every metric is a function of sums over rows, a corpus metric (BLEU, character error rate)
is resampled as exactly as a mean: ``combine(counts @ statistics)`` is the metric of the drawn rows.

To add a metric, write the function of one row and add one line to ``METRICS``.

Texts are compared as they are written. LaTeX that means the same and is spelled differently
(``\frac{1}{2}`` and ``\frac { 1 } { 2 }``) is different text here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from sacrebleu.metrics.bleu import BLEU

from vlmtune.errors import DataError, UsageError

Array = NDArray[np.float64]
Combine = Callable[[Array], Array]
Statistics = Callable[[str, Sequence[str]], tuple[float, ...]]

ANLS_THRESHOLD = 0.5
BLEU_ORDER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A measure of how well predictions match their references.

    Attributes:
        name: As it is asked for on the command line.
        range: Smallest and largest possible value.
        higher_is_better: Direction of improvement.
        meaning: What the value says, in one line for people.
        source: Paper or file the definition comes from.
        statistics: Of one row: ``(prediction, references) -> k numbers``; references are not empty.
        combine: Summed statistics to values, shape ``(..., k) -> (...)``.
        combine_row: The same for a row alone, where a corpus formula says nothing about one row.
        proportion: Whether a row counts (0 or 1, 1), so that the value is a share of rows.
    """

    name: str
    range: tuple[float, float]
    higher_is_better: bool
    meaning: str
    source: str
    statistics: Statistics
    combine: Combine
    combine_row: Combine | None = None
    proportion: bool = False


def normalise(text: str) -> str:
    """Lower case, outer whitespace stripped, inner whitespace collapsed to single spaces."""
    return " ".join(text.lower().split())


def _exact_match(prediction: str, references: Sequence[str]) -> float:
    return float(any(prediction.strip() == reference.strip() for reference in references))


def _accuracy(prediction: str, references: Sequence[str]) -> float:
    return float(any(normalise(prediction) == normalise(reference) for reference in references))


def _edit_similarity(prediction: str, references: Sequence[str]) -> float:
    return max(Levenshtein.normalized_similarity(prediction, text) for text in references)


def _anls(prediction: str, references: Sequence[str]) -> float:
    distance = min(
        Levenshtein.normalized_distance(normalise(prediction), normalise(reference))
        for reference in references
    )
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def _cer_statistics(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """Edits to the best reference, and its length.

    Best is the lowest rate, then the fewest edits.
    """
    pairs = [(Levenshtein.distance(text, prediction), len(text)) for text in references]
    edits, length = min(pairs, key=lambda pair: (pair[0] / max(pair[1], 1), pair[0]))
    return float(edits), float(length)


def _cer(sums: Array) -> Array:
    # References that are all empty have no rate; each character written is then one error.
    return sums[..., 0] / np.maximum(sums[..., 1], 1.0)


_SENTENCE_BLEU = BLEU(tokenize="13a", effective_order=True)  # only its counts are used


def _bleu_statistics(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
    """Lengths of prediction and closest reference, matched n-grams, all n-grams: 2 + 4 + 4."""
    score = _SENTENCE_BLEU.sentence_score(prediction, list(references))
    return tuple(map(float, (score.sys_len, score.ref_len, *score.counts, *score.totals)))


def _bleu(sums: Array, *, effective_order: bool) -> Array:
    """BLEU from summed counts, as sacrebleu's ``BLEU.compute_bleu`` with ``exp`` smoothing.

    With ``effective_order`` a text shorter than four tokens is judged by the n-grams it has.
    """
    predicted, expected = sums[..., 0], sums[..., 1]
    matched, total = sums[..., 2 : 2 + BLEU_ORDER], sums[..., 2 + BLEU_ORDER :]
    logarithms = np.zeros(predicted.shape)
    orders = np.zeros(predicted.shape)
    smoothing = np.ones(predicted.shape)
    for order in range(BLEU_ORDER):
        present = total[..., order] > 0
        missed = present & (matched[..., order] == 0)
        smoothing = np.where(missed, 2.0 * smoothing, smoothing)
        hits = np.where(missed, 1.0 / smoothing, matched[..., order])
        precision = np.where(present, hits / np.maximum(total[..., order], 1.0), 1.0)
        logarithms += np.log(precision)
        orders += present
    brevity = np.exp(np.minimum(0.0, 1.0 - expected / np.maximum(predicted, 1.0)))
    value = np.minimum(1.0, brevity * np.exp(logarithms / np.maximum(orders, 1.0)))
    defined = matched.any(axis=-1) & ((orders == BLEU_ORDER) | effective_order)
    return np.where(defined, value, 0.0)


def _mean(sums: Array) -> Array:
    return sums[..., 0] / sums[..., 1]


def _mean_of(
    name: str,
    score: Callable[[str, Sequence[str]], float],
    meaning: str,
    source: str,
    *,
    proportion: bool = False,
) -> Metric:
    """A metric that is the mean over rows of a score in 0..1, higher being better."""

    def statistics(prediction: str, references: Sequence[str]) -> tuple[float, float]:
        return score(prediction, references), 1.0

    return Metric(
        name=name,
        range=(0.0, 1.0),
        higher_is_better=True,
        meaning=meaning,
        source=source,
        statistics=statistics,
        combine=_mean,
        proportion=proportion,
    )


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _mean_of(
            "exact_match",
            _exact_match,
            "share of answers equal to a reference, outer whitespace aside",
            "SQuAD (Rajpurkar et al., 2016), without its normalisation of case and articles",
            proportion=True,
        ),
        _mean_of(
            "edit_similarity",
            _edit_similarity,
            "1 - edit distance / longer length, in characters, best reference, mean over rows",
            "Levenshtein (1966); rapidfuzz.distance.Levenshtein.normalized_similarity",
        ),
        Metric(
            name="cer",
            range=(0.0, math.inf),
            higher_is_better=False,
            meaning="edits to the best reference per character of it, over all rows",
            source="Morris, Maier and Green (2004), word error rate, counted in characters",
            statistics=_cer_statistics,
            combine=_cer,
        ),
        Metric(
            name="bleu",
            range=(0.0, 1.0),
            higher_is_better=True,
            meaning="corpus BLEU-4 with 13a tokens, 0 to 1",
            source="Papineni et al. (2002); sacrebleu.corpus_bleu / 100 (Post, 2018)",
            statistics=_bleu_statistics,
            combine=partial(_bleu, effective_order=False),
            combine_row=partial(_bleu, effective_order=True),
        ),
        _mean_of(
            "anls",
            _anls,
            "edit similarity of normalised answers, 0 where less than half is right",
            "ST-VQA (Biten et al., 2019); similarity kept while normalised distance < 0.5",
        ),
        _mean_of(
            "accuracy",
            _accuracy,
            "share of answers equal to a reference after lower case and single spaces",
            "proportion of correct class labels",
            proportion=True,
        ),
    )
}


def find(name: str) -> Metric:
    """The metric of that name.

    Raises:
        UsageError: If there is none; names the nearest and all.
    """
    if name in METRICS:
        return METRICS[name]
    nearest = get_close_matches(name, METRICS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UsageError(f"there is no metric {name!r}; {hint}The metrics are {', '.join(METRICS)}.")


def row_score(metric: Metric, prediction: str, references: Sequence[str]) -> float:
    """Value of one row alone, in the metric's range.

    Raises:
        DataError: With code ``no_references`` if there is nothing to compare with.
    """
    combine = metric.combine_row or metric.combine
    return float(combine(statistics(metric, [prediction], [references])[0]))


def row_scores(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, list[float]]:
    """Each metric's value of every row alone, in the order of the rows."""
    return {
        name: (metric.combine_row or metric.combine)(
            statistics(metric, predictions, references)
        ).tolist()
        for name, metric in ((name, find(name)) for name in names)
    }


def statistics(
    metric: Metric, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Array:
    """Sufficient statistics of every row, shape ``(rows, k)``.

    Raises:
        DataError: With code ``no_rows``, ``rows_differ`` (not as many references as predictions) or
            ``no_references`` (a row without any).
    """
    if not predictions and not references:
        raise DataError("no_rows", f"{metric.name} of 0 rows has no value; expected at least one")
    if len(predictions) != len(references):
        raise DataError(
            "rows_differ",
            f"{len(predictions)} predictions stand beside {len(references)} lists of references; "
            "expected one list a prediction",
        )
    for row, acceptable in enumerate(references):
        if not acceptable or isinstance(acceptable, str):
            raise DataError(
                "no_references",
                f"row {row} (counted from 0) has {acceptable!r} as references; expected a list of "
                "at least one acceptable answer",
            )
    return np.array(
        [metric.statistics(text, row) for text, row in zip(predictions, references, strict=True)],
        dtype=np.float64,
    )
