"""Chance is each row's own: neighbours and the size of the batch change nothing."""

from __future__ import annotations

import pytest
import torch

from vlmtune.serving.sampling import Wish, choose, generator

VOCABULARY = 50


def wish(seed=0, temperature=1.0, top_p=1.0, top=None):
    return Wish(temperature, top_p, generator(seed, 0), top)


def logits(rows, seed=0):
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def test_zero_is_the_likeliest():
    rows = logits(5)
    picks = choose(rows, [wish(temperature=0.0) for _ in range(5)])
    assert [pick.token for pick in picks] == rows.argmax(dim=-1).tolist()


def test_a_row_draws_alike_whatever_stands_beside_it():
    """Also where the neighbour's arithmetic differs in the last bits."""
    alone, beside = wish(seed=7, top_p=0.9), wish(seed=7, top_p=0.9)
    for step in range(200):
        rows = logits(3, seed=step)
        (one,) = choose(rows[:1], [alone])
        nudged = rows + torch.randn_like(rows) * 1e-6
        other = choose(nudged, [beside, wish(seed=step), wish(temperature=0.0)])[0]
        assert one.token == other.token
    others = wish(seed=8, top_p=0.9)  # the control: another seed says something else
    same = [
        choose(logits(1, seed=step), [wish(seed=7)])[0] == choose(logits(1, seed=step), [others])[0]
        for step in range(50)
    ]
    assert not all(same)


def test_the_frequencies_are_the_probabilities():
    row = logits(1)
    probability = (row.double() / 0.7).softmax(dim=-1)[0]
    draws = 6000
    picks = choose(row.expand(draws, -1), [wish(seed, 0.7) for seed in range(draws)])
    counts = torch.bincount(torch.tensor([pick.token for pick in picks]), minlength=VOCABULARY)
    error = (counts / draws - probability).abs()
    assert (error < 5 * (probability * (1 - probability) / draws).sqrt() + 1e-4).all()


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.7, 0.95])
def test_top_p_draws_from_the_smallest_set_that_reaches_it(top_p):
    row = logits(1, seed=3)
    ordered, order = row.double().softmax(dim=-1)[0].sort(descending=True)
    size = int((ordered.cumsum(0) < top_p).sum()) + 1
    picks = choose(row.expand(3000, -1), [wish(seed, 1.0, top_p) for seed in range(3000)])
    assert {pick.token for pick in picks} <= set(order[:size].tolist())
    everything = choose(row.expand(3000, -1), [wish(seed) for seed in range(3000)])
    assert {pick.token for pick in everything} > {pick.token for pick in picks}


def test_hardly_any_temperature_is_greedy():
    rows = logits(20)
    picks = choose(rows, [wish(seed, 1e-8) for seed in range(20)])
    assert [pick.token for pick in picks] == rows.argmax(dim=-1).tolist()


def test_a_token_without_probability_is_never_drawn():
    row = torch.full((1, VOCABULARY), -torch.inf)
    row[0, 17] = 1.0
    picks = choose(row.expand(500, -1), [wish(seed, 2.0) for seed in range(500)])
    assert {pick.token for pick in picks} == {17}


def test_a_row_that_is_no_number_is_told_apart():
    rows = logits(3)
    rows[1, 5] = torch.nan
    picks = choose(rows, [wish(), wish(), wish(temperature=0.0)])
    assert picks[1] is None
    assert picks[0] is not None
    assert picks[2] is not None
    rows[0, 0] = torch.inf
    assert choose(rows, [wish(), wish(), wish()])[0] is None


def test_logprobs_are_the_models_own():
    rows = logits(3)
    expected = rows.log_softmax(dim=-1)
    picks = choose(rows, [wish(1, 2.0, 0.5, top=2), wish(2), wish(3, 0.0, top=0)])
    for row, count in ((0, 2), (2, 0)):
        pick = picks[row]
        assert pick.logprob == pytest.approx(float(expected[row, pick.token]), abs=1e-5)
        values, ids = expected[row].topk(count)
        assert [token for token, _ in pick.top] == ids.tolist()
        assert [value for _, value in pick.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert picks[1].top == ()
