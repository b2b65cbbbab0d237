"""The held-out formulas are not trivial, and nobody has seen them."""

from __future__ import annotations

import random
import re
import statistics

import pytest

from vlmtune.formulas import formulas, latex, random_tree, split_of
from vlmtune.quickstart.tasks import FORMULA_SEED, TASKS
from vlmtune.verbs.quickstart import HELD_OUT

LAID_OUT = re.compile(r"\\frac|\\sqrt|[_^]")


@pytest.fixture(scope="module")
def held_out():
    return formulas(HELD_OUT, FORMULA_SEED, split="held_out")


def test_they_are_not_trivial(held_out):
    assert statistics.median(len(formula.split()) for formula in held_out) >= 20
    assert len({t for formula in held_out for t in formula.split() if t.startswith("\\")}) >= 40
    assert sum(bool(LAID_OUT.search(formula)) for formula in held_out) / len(held_out) >= 0.6


def test_nobody_has_seen_them(held_out):
    def squeezed(texts):
        return {"".join(text.split()) for text in texts}

    training = squeezed(formulas(TASKS["formulas"].rows, FORMULA_SEED, split="training"))
    rng = random.Random(0)
    everything = squeezed(latex(random_tree(rng, rng.randint(1, 16))) for _ in range(4000))
    pretraining = {formula for formula in everything if split_of(formula) == "pretraining"}
    assert len(pretraining) > 2000
    assert not squeezed(held_out) & (training | pretraining)
    # The control: without splits the grammar says the same thing again and again.
    again = squeezed(latex(random_tree(random.Random(n), n % 3 + 1)) for n in range(4000))
    assert again & everything
