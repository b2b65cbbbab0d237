"""The caption metrics of COCO's evaluation server: BLEU-1 … 4, ROUGE-L and CIDEr-D.

They differ from their namesakes elsewhere in tokens (lower case, no punctuation), in smoothing, and
in CIDEr's length penalty; figures of papers on captions are these. Checked to six decimals against
the published scores of 1,000 images (Chen et al. 2015, arXiv 1504.00325; github.com/tylin/
coco-caption).

Tokens: the server runs the Penn Treebank tokenizer in Java; ``words`` follows its rules as far as
captions need them. Of the 6,000 published captions, which were cut by that tokenizer, it changes
one: theirs kept the period of "getting ready to bat." and of no other bat. So references that are
tokens already are left as they are.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from vlmtune.evaluation.metric import Array, Metric, RowStatistics, mean, of_sums

Tokens = Sequence[str]
Gram = tuple[str, ...]

ORDER = 4
ROUGE_BETA = 1.2  # recall counts for more
CIDER_SIGMA = 6.0  # of the Gaussian penalty on a difference of length
SMALL, TINY = 1e-9, 1e-15  # the server's smoothing of BLEU
ODD = 1e-3  # share of texts that may not be tokens yet, in references that are

PUNCTUATION = frozenset(
    "'' ' `` ` -lrb- -rrb- -lcb- -rcb- . ? ! , : - -- ... ; ( ) { } [ ] \"".split()  # noqa: SIM905
)
CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b", re.IGNORECASE)
ABBREVIATION = r"(?:st|etc|dr|mr|mrs|ms|rd|ave|jr|sr|vs|inc|co|no)\."
TOKEN = re.compile(
    rf"n't|'(?:s|re|ve|ll|d|m)\b|-[lr][rc]b-|\b{ABBREVIATION}|[^\W_]+(?:[-'&./:][^\W_]+)*"
    r"|\.\.\.|--|\S"
)


def words(text: str) -> list[str]:
    """Tokens of a caption: lower case, contractions apart (``is n't``), punctuation left out."""
    apart = CONTRACTION.sub(r" \1", text.lower())
    return [token for token in TOKEN.findall(apart) if token not in PUNCTUATION]


def cutter(references: Sequence[Sequence[str]]) -> Callable[[str], list[str]]:
    """How the references of a set become tokens: at blanks if they are tokens already."""
    texts = [text for row in references for text in row]
    changed = sum(words(text) != text.split() for text in texts)
    return str.split if changed <= ODD * len(texts) else words


def bleu_statistics(said: Tokens, known: Sequence[Tokens]) -> tuple[float, ...]:
    """Lengths of prediction and closest reference, matched n-grams, all n-grams: 2 + 4 + 4."""
    closest = min((abs(len(each) - len(said)), len(each)) for each in known)[1]
    grams = _grams(said)
    most: Counter[Gram] = Counter()
    for each in known:
        most |= _grams(each)
    matched = [0] * ORDER
    for gram, count in grams.items():
        matched[len(gram) - 1] += min(count, most[gram])
    total = [max(0, len(said) - order) for order in range(ORDER)]
    return tuple(map(float, (len(said), closest, *matched, *total)))


def bleu(sums: Array, order: int) -> Array:
    """BLEU of an order from summed statistics, shape ``(..., 10) -> (...)``."""
    matched, total = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
    precision = (matched + TINY) / (total + SMALL)
    value = np.exp(np.log(precision[..., :order]).sum(axis=-1) / order)
    ratio = (sums[..., 0] + TINY) / (sums[..., 1] + SMALL)
    return np.asarray(value * np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio)))


def rouge_l(said: Tokens, known: Sequence[Tokens]) -> float:
    """F-measure of the longest common subsequence, best precision and best recall (Lin 2004)."""
    if not said or not any(known):
        return 0.0
    common = [_common(said, each) for each in known]
    precision = max(common) / len(said)
    recall = max(length / max(len(each), 1) for length, each in zip(common, known, strict=True))
    if not precision or not recall:
        return 0.0
    square = ROUGE_BETA**2
    return (1 + square) * precision * recall / (recall + square * precision)


def cider(rows: Sequence[Sequence[Tokens]]) -> Callable[[Tokens, Sequence[Tokens]], float]:
    """CIDEr-D of one row, 0 to 10; how rare an n-gram is comes from the references of all rows.

    Source: Vedantam, Zitnick and Parikh 2015, arXiv 1411.5726.

    Args:
        rows: The references of every row of the set.
    """
    seen = Counter(gram for row in rows for gram in {gram for each in row for gram in _grams(each)})
    logarithm = math.log(max(len(rows), 1))

    def weights(grams: Mapping[Gram, int]) -> dict[Gram, float]:
        return {
            gram: count * (logarithm - math.log(max(1, seen[gram])))
            for gram, count in grams.items()
        }

    def score(said: Tokens, known: Sequence[Tokens]) -> float:
        mine = weights(_grams(said))
        total = 0.0
        for each in known:
            # The server counts a text's bigrams for its length: one less than its words.
            difference = max(0, len(said) - 1) - max(0, len(each) - 1)
            penalty = math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
            total += penalty * _likeness(mine, weights(_grams(each)))
        return 10.0 * total / len(known)

    return score


def _likeness(mine: Mapping[Gram, float], theirs: Mapping[Gram, float]) -> float:
    """Mean over the orders of a cosine that does not reward repetition."""
    products, squares, others = ([0.0] * ORDER for _ in range(3))
    for gram, weight in theirs.items():
        others[len(gram) - 1] += weight**2
        products[len(gram) - 1] += min(mine.get(gram, 0.0), weight) * weight
    for gram, weight in mine.items():
        squares[len(gram) - 1] += weight**2
    norms = [math.sqrt(a * b) for a, b in zip(squares, others, strict=True)]
    return (
        sum(product / norm if norm else 0.0 for product, norm in zip(products, norms, strict=True))
        / ORDER
    )


def _grams(tokens: Sequence[str]) -> Counter[Gram]:
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, ORDER + 1)
        for start in range(len(tokens) - order + 1)
    )


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for left in first:
        diagonal = 0
        for place, right in enumerate(second, start=1):
            above = row[place]
            row[place] = diagonal + 1 if left == right else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def _bleu_of_set(references: Sequence[Sequence[str]]) -> RowStatistics:
    cut = cutter(references)
    return lambda said, known: bleu_statistics(words(said), [cut(each) for each in known])


def _rouge_of_set(references: Sequence[Sequence[str]]) -> RowStatistics:
    cut = cutter(references)
    return lambda said, known: (rouge_l(words(said), [cut(each) for each in known]), 1.0)


def _cider_of_set(references: Sequence[Sequence[str]]) -> RowStatistics:
    cut = cutter(references)
    score = cider([[cut(text) for text in row] for row in references])
    return lambda said, known: (score(words(said), [cut(each) for each in known]), 1.0)


CAPTION_METRICS = (
    *(
        Metric(
            name=f"caption_bleu_{order}",
            range=(0.0, 1.0),
            higher_is_better=True,
            meaning=f"corpus BLEU-{order} of captions, as COCO's evaluation server counts it",
            source="Papineni et al. (2002); coco-caption (Chen et al., 2015)",
            of_set=_bleu_of_set,
            value=of_sums(partial(bleu, order=order)),
            alone=partial(bleu, order=order),
        )
        for order in range(1, ORDER + 1)
    ),
    Metric(
        name="rouge_l",
        range=(0.0, 1.0),
        higher_is_better=True,
        meaning="longest common run of words with the best reference, mean over rows",
        source="Lin (2004), beta 1.2, as in coco-caption (Chen et al., 2015)",
        of_set=_rouge_of_set,
        value=of_sums(mean),
        alone=mean,
    ),
    Metric(
        name="cider",
        range=(0.0, 10.0),
        higher_is_better=True,
        meaning="likeness to all references in n-grams, rare ones counting more, mean over rows",
        source="CIDEr-D (Vedantam et al., 2015), as in coco-caption (Chen et al., 2015)",
        of_set=_cider_of_set,
        value=of_sums(mean),
        alone=mean,
    ),
)
