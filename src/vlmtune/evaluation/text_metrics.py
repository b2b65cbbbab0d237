"""How alike texts are, as pure functions of one row's texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
from rapidfuzz.distance import Levenshtein

from vlmtune.evaluation.metric import Array, Metric, mean_of, of_row, of_sums

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

ANLS_THRESHOLD = 0.5
BLEU_ORDER = 4


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
    return np.asarray(sums[..., 0] / np.maximum(sums[..., 1], 1.0))


@cache
def _sentence_bleu() -> BLEU:
    """Only its counts are used. Its package is not imported where nothing is judged by it."""
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="13a", effective_order=True)


def _bleu_statistics(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
    """Lengths of prediction and closest reference, matched n-grams, all n-grams: 2 + 4 + 4."""
    score = _sentence_bleu().sentence_score(prediction, list(references))
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


TEXT_METRICS = (
    mean_of(
        "exact_match",
        _exact_match,
        "share of answers equal to a reference, outer whitespace aside",
        "SQuAD (Rajpurkar et al., 2016), without its normalisation of case and articles",
        proportion=True,
    ),
    mean_of(
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
        of_set=of_row(_cer_statistics),
        value=of_sums(_cer),
        alone=_cer,
    ),
    Metric(
        name="bleu",
        range=(0.0, 1.0),
        higher_is_better=True,
        meaning="corpus BLEU-4 with 13a tokens, 0 to 1",
        source="Papineni et al. (2002); sacrebleu.corpus_bleu / 100 (Post, 2018)",
        of_set=of_row(_bleu_statistics),
        value=of_sums(partial(_bleu, effective_order=False)),
        alone=partial(_bleu, effective_order=True),
    ),
    mean_of(
        "anls",
        _anls,
        "edit similarity of normalised answers, 0 where less than half is right",
        "ST-VQA (Biten et al., 2019); similarity kept while normalised distance < 0.5",
    ),
    mean_of(
        "accuracy",
        _accuracy,
        "share of answers equal to a reference after lower case and single spaces",
        "proportion of correct class labels",
        proportion=True,
    ),
)
