"""The plan: every row once an epoch, in packs that fit, decided by its arguments alone."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.batching.planner import make_plan, pack_indices

BASIC = {
    "batch_size": 4,
    "epochs": 2.0,
    "max_steps": None,
    "max_length": 100,
    "token_budget": 128,
    "seed": 0,
}
lengths = st.lists(st.integers(1, 130), min_size=1, max_size=40)


def plan_of(given_lengths, **changes):
    return make_plan(given_lengths, **{**BASIC, **changes})


def stream(plan):
    return [row for step in plan for row in step.rows]


# Rows


@given(lengths, st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_every_row_that_fits_comes_once_an_epoch(given_lengths, batch_size, epochs, seed):
    plan = plan_of(given_lengths, batch_size=batch_size, epochs=float(epochs), seed=seed)
    fitting = [index for index, length in enumerate(given_lengths) if length <= 100]
    rows = stream(plan)
    assert plan.kept.tolist() == fitting
    assert len(rows) == epochs * len(fitting)
    for epoch in range(epochs):
        assert sorted(rows[epoch * len(fitting) : (epoch + 1) * len(fitting)]) == fitting


@given(lengths, st.integers(1, 9))
def test_steps_are_full_but_the_last(given_lengths, batch_size):
    """Epochs follow without a gap: a step may hold the end of one and the beginning of the next."""
    plan = plan_of(given_lengths, batch_size=batch_size)
    sizes = [len(step.rows) for step in plan]
    assert [step.number for step in plan] == list(range(1, plan.steps + 1))
    assert all(size == batch_size for size in sizes[:-1])
    assert plan.steps == math.ceil(plan.samples / batch_size)
    assert sum(sizes) == plan.samples


def test_a_step_over_the_end_of_an_epoch():
    plan = plan_of([10] * 6, epochs=2.0, batch_size=4)
    rows = stream(plan)
    assert [len(step.rows) for step in plan] == [4, 4, 4]
    assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))
    assert rows[:6] != rows[6:]  # another order


@pytest.mark.parametrize(("epochs", "samples"), [(0.5, 5), (1.3, 13), (2.0, 20), (0.04, 0)])
def test_a_fraction_stops_within_an_epoch(epochs, samples):
    plan = plan_of([10] * 10, epochs=epochs)
    assert plan.samples == samples
    counted = Counter(stream(plan))
    assert sum(counted.values()) == samples
    assert max(counted.values(), default=0) - min(counted.values(), default=0) <= 1


def test_steps_instead_of_epochs():
    plan = plan_of([10] * 6, max_steps=5, epochs=99.0)
    assert plan.steps == 5
    assert [len(step.rows) for step in plan] == [4] * 5


def test_too_long_rows_are_left_out_and_never_cut():
    plan = plan_of([100, 101, 5, 10**18], epochs=1.0)
    assert plan.kept.tolist() == [0, 2]
    assert sorted(stream(plan)) == [0, 2]


@pytest.mark.parametrize("given_lengths", [[], [101, 102]])
@pytest.mark.parametrize("max_steps", [None, 7])
def test_nothing_fits(given_lengths, max_steps):
    plan = plan_of(given_lengths, max_steps=max_steps)
    assert (plan.steps, list(plan)) == (0, [])


# Packs


@given(lengths, st.integers(1, 200))
def test_packs_hold_the_rows_of_their_step_and_keep_to_the_budget(given_lengths, budget):
    for step in plan_of(given_lengths, token_budget=budget):
        assert Counter(row for pack in step.packs for row in pack) == Counter(step.rows)
        for pack in step.packs:
            tokens = sum(given_lengths[row] for row in pack)
            assert tokens <= budget or len(pack) == 1


@given(lengths, st.integers(1, 200))
def test_no_pack_could_have_joined_an_earlier_one(given_lengths, budget):
    """First fit: the longest row of a pack had no room in any pack before it."""
    packs = pack_indices(range(len(given_lengths)), given_lengths, budget)
    for index, pack in enumerate(packs):
        for earlier in packs[:index]:
            free = budget - sum(
                given_lengths[row]
                for row in earlier
                if given_lengths[row] >= given_lengths[pack[0]]
            )
            assert given_lengths[pack[0]] > free
    for pack in packs:
        inside = [given_lengths[row] for row in pack]
        assert inside == sorted(inside, reverse=True)


def test_first_fit_decreasing_by_hand():
    found = pack_indices([0, 1, 2, 3, 4, 5], [40, 70, 30, 60, 200, 30], 100)
    assert found == ((4,), (1, 2), (3, 0), (5,))


def test_ties_keep_the_given_order():
    assert pack_indices([3, 1, 2, 0], [50] * 4, 100) == ((3, 1), (2, 0))


@given(lengths, st.integers(1, 50), st.integers(51, 5000))
def test_the_budget_does_not_decide_which_rows_a_step_holds(given_lengths, small, large):
    one, other = (plan_of(given_lengths, token_budget=budget) for budget in (small, large))
    assert [step.rows for step in one] == [step.rows for step in other]
    assert one.fingerprint() == other.fingerprint()


# The same plan again


@given(lengths, st.integers(0, 2**32))
def test_a_plan_is_decided_by_its_arguments(given_lengths, seed):
    one, other = plan_of(given_lengths, seed=seed), plan_of(given_lengths, seed=seed)
    steps = list(one)
    assert steps == list(other)
    # Asked for in another order, as a resumed run does, the steps are the same.
    assert [other.step(step.number) for step in reversed(steps)] == steps[::-1]
    assert one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch_size": 5}, {"epochs": 3.0}, {"max_length": 10}]
)
def test_another_argument_is_another_plan(change):
    given_lengths = [10, 20, 30, 40, 50, 60]
    assert plan_of(given_lengths).fingerprint() != plan_of(given_lengths, **change).fingerprint()


def test_another_seed_is_another_order_of_the_same_rows():
    one, other = (stream(plan_of([10] * 20, epochs=1.0, seed=seed)) for seed in (0, 1))
    assert one != other
    assert sorted(one) == sorted(other)
    assert one != sorted(one)
