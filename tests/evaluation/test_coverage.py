"""A 95 % interval holds the truth 93 to 97 times of a hundred, from 200 rows on: simulated.

A large population of rows has the true value; samples of it are measured as validation rows are.
The 2,000 samples leave a coverage of 95 % uncertain by a half per cent.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from vlmtune.data.conversation import Box
from vlmtune.evaluation.intervals import compare, estimate
from vlmtune.evaluation.metric import Array, statistics, value
from vlmtune.evaluation.metrics import find

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SAMPLES = 2000
WORDS = ("a", "the", "man", "dog", "red", "hat", "rides", "in", "street", "two", "old", "snow")


def similarities(draw: np.random.Generator) -> Array:
    """Many answers are right, the others anything: a skewed mean."""
    scores = np.where(draw.random(50_000) < 0.4, 1.0, draw.beta(2, 2, 50_000))
    return np.column_stack([scores, np.ones(50_000)])


def nearly_right(draw: np.random.Generator) -> Array:
    """A mean near its ceiling: seven rows in a hundred are anything."""
    scores = np.where(draw.random(50_000) < 0.93, 1.0, draw.random(50_000))
    return np.column_stack([scores, np.ones(50_000)])


def error_rates(draw: np.random.Generator) -> Array:
    """Rows of unlike length, and errors that come in bursts."""
    lengths = np.ceil(draw.lognormal(4, 0.5, 50_000))
    rates = draw.gamma(1.0, 0.1, 50_000)
    return np.column_stack([np.round(lengths * rates), lengths])


def shares(right: float) -> Callable[[np.random.Generator], Array]:
    def population(draw: np.random.Generator) -> Array:
        return np.column_stack([draw.random(50_000) < right, np.ones(50_000)]).astype(float)

    return population


def captions(name: str) -> Callable[[np.random.Generator], Array]:
    """Texts of unlike length and unlike quality."""

    def population(draw: np.random.Generator) -> Array:
        rng = random.Random(int(draw.integers(1 << 30)))
        references, predictions = [], []
        for _ in range(4000):
            text = rng.choices(WORDS, k=rng.randint(4, 24))
            wrong = rng.choice((0.0, 0.1, 0.3, 0.6))
            said = [word if rng.random() > wrong else rng.choice(WORDS) for word in text]
            references.append([" ".join(text)])
            predictions.append(" ".join(said[: rng.randint(len(said) - 2, len(said))]))
        return statistics(find(name), predictions, references)

    return population


def classes(draw: np.random.Generator) -> Array:
    true = draw.choice(4, 50_000, p=(0.4, 0.3, 0.2, 0.1))
    named = np.where(draw.random(50_000) < 0.7, true, draw.integers(-1, 4, 50_000))
    return np.column_stack([true, named]).astype(float)


CASES = [
    ("edit_similarity", similarities),
    ("edit_similarity", nearly_right),
    ("cer", error_rates),
    ("bleu", captions("bleu")),
    ("cider", captions("cider")),
    ("macro_f1", classes),
    ("exact_match", shares(0.7)),
    ("exact_match", shares(0.97)),
]


@pytest.mark.parametrize("rows", [200, 500])
@pytest.mark.parametrize(
    ("name", "population"),
    CASES,
    ids=["mean", "mean near 1", "ratio", "bleu", "cider", "macro_f1", "share 0.7", "share 0.97"],
)
def test_intervals_hold_the_truth(name, population, rows, record_property):
    draw = np.random.default_rng(rows)
    everything = population(draw)
    metric = find(name)
    truth = value(metric, everything)
    held = narrow = 0
    for seed in range(SAMPLES):
        sample = everything[draw.integers(len(everything), size=rows)]
        found = estimate(metric, sample, seed=seed)
        held += found.low <= truth <= found.high
        half = (found.high - found.low) / 4
        narrow += abs(found.value - truth) <= half
    record_property("coverage", held / SAMPLES)
    print(f"{name}, {rows} rows: {held / SAMPLES:.1%}")
    assert 0.93 <= held / SAMPLES <= 0.97
    assert narrow / SAMPLES < 0.75  # negative control: half as wide, they do not


@pytest.mark.parametrize("rows", [200])
def test_average_precision(rows):
    """Of boxes, with fewer samples: each takes a tenth of a second."""
    rng = random.Random(1)

    def corners() -> tuple[float, float, float, float]:
        x, y = rng.random() * 60, rng.random() * 60
        return x, y, x + 10 + rng.random() * 30, y + 10 + rng.random() * 30

    truth, found = [], []
    for _ in range(3000):
        real = [Box(0, rng.choice("abc"), corners()) for _ in range(rng.randint(1, 4))]
        said = [
            Box(0, each.label, tuple(edge + rng.gauss(0, 2.5) for edge in each.xyxy))  # type: ignore[arg-type]
            for each in real
            if rng.random() < 0.8
        ]
        said += [Box(0, rng.choice("abc"), corners()) for _ in range(rng.randint(0, 1))]
        rng.shuffle(said)
        truth.append(real)
        found.append(said)
    metric = find("average_precision")
    everything = statistics(metric, found, truth)
    exact = value(metric, everything)
    draw = np.random.default_rng(rows)
    held = 0
    for seed in range(400):
        sample = everything[draw.integers(len(everything), size=rows)]
        interval = estimate(metric, sample, seed=seed)
        held += interval.low <= exact <= interval.high
    print(f"average_precision, {rows} rows: {held / 400:.1%}")
    assert 0.92 <= held / 400 <= 0.98


def test_differences_hold_the_truth():
    """Paired: the interval of a difference, and how often equal models are called unequal."""
    draw = np.random.default_rng(5)
    hard = draw.beta(2, 2, 50_000)
    before, after = (
        np.column_stack([np.clip(hard + draw.normal(shift, 0.1, 50_000), 0, 1), np.ones(50_000)])
        for shift in (0.0, 0.02)
    )
    metric = find("edit_similarity")
    truth = value(metric, after) - value(metric, before)
    held = claims = 0
    for seed in range(SAMPLES):
        rows = draw.integers(50_000, size=200)
        found = compare(metric, before[rows], after[rows], seed=seed)
        held += found.low <= truth <= found.high
        swap = draw.random(200)[:, None] < 0.5  # equal by construction
        first, second = before[rows], after[rows]
        mixed = np.where(swap, first, second), np.where(swap, second, first)
        claims += compare(metric, *mixed, seed=seed).verdict != "none"
    print(f"difference: {held / SAMPLES:.1%}; equal called unequal: {claims / SAMPLES:.1%}")
    assert 0.93 <= held / SAMPLES <= 0.97
    assert 0.03 <= claims / SAMPLES <= 0.07
