"""What the base is told about where shapes are is true, and the losses ask for nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vlmtune.quickstart.base import hints, pretrain
from vlmtune.quickstart.base.hints import NAME_LAYER, PLACE_LAYER, place_loss
from vlmtune.quickstart.base.model import BaseSize, batch_logits, build_model, see
from vlmtune.quickstart.base.rows import Collator, Rows
from vlmtune.quickstart.pictures import SIDE
from vlmtune.quickstart.shapes import COLOURS, SHAPES

SMALL = BaseSize(hidden=64, layers=3, intermediate=96, vision_width=64, vision_layers=2)


@pytest.fixture(scope="module")
def collator(tokenizer):
    return Collator(tokenizer)


def scenes(*, finds=True, asks=0.5, count=24):
    rows = Rows(5, (0, 0, 0.3, 0.7))
    rows.asks, rows.finds = asks, finds
    return rows.step(1, count, 0.0)


def loss_of(model, batch):
    scores = dict.fromkeys((NAME_LAYER, PLACE_LAYER))
    features = see(model, batch)
    batch_logits(model, batch, features, scores)
    return place_loss(model, features, batch, batch.spots, scores)


def test_a_shape_is_where_it_is_said_to_be():
    """Seen in the pixels; the control: at the cells of the other shapes it is not."""
    seen = []
    for row in scenes():
        height, width = row.page.shape[0] // SIDE, row.page.shape[1] // SIDE
        blocks = row.page.reshape(height, SIDE, width, SIDE, 3).transpose(0, 2, 1, 3, 4)
        blocks = blocks.reshape(height * width, -1, 3)
        for spot in row.spots:
            colour = torch.tensor(COLOURS[spot.words[0]])
            for other in row.spots:
                pixels = torch.from_numpy(blocks[list(other.cells)].copy()).flatten(0, 1)
                here = bool((pixels == colour).all(dim=-1).any())
                same = spot.words[0] == other.words[0]
                seen.append((spot is other or same, here))
            left, top, right, bottom = spot.sides
            ys, xs = (row.page == colour.numpy()).all(axis=-1).nonzero()
            count = sum(other.words[0] == spot.words[0] for other in row.spots)
            if count == 1:
                assert xs.min() / row.page.shape[1] >= left - 0.01
                assert (xs.max() + 1) / row.page.shape[1] <= right + 0.01
                assert ys.min() / row.page.shape[0] >= top - 0.01
                assert (ys.max() + 1) / row.page.shape[0] <= bottom + 0.01
    own, others = ([here for own, here in seen if own is which] for which in (True, False))
    assert sum(own) > 0.95 * len(own)
    assert sum(others) < 0.2 * len(others)


def test_what_is_asked_for_is_marked_and_named_first():
    rows = scenes()
    asked = [(row, spot) for row in rows for spot in row.spots if spot.asked]
    assert asked
    for row, spot in asked:
        assert f"the {spot.words[1]} " in row.prompt
        assert row.answer.startswith(
            f"{spot.words[1]} left:{min(99, round(100 * spot.sides[0])):02d}"
        )
    for row in rows:
        assert {spot.words[1] for spot in row.spots} <= set(SHAPES)
        if not any(spot.asked for spot in row.spots):
            assert all(" ".join(spot.words) in row.answer for spot in row.spots)
    assert not [spot for row in scenes(finds=False) for spot in row.spots]


def test_spans_come_in_any_order_once_places_are_told():
    def orders(finds):
        for row in scenes(finds=finds, asks=0.0):
            if " from " in row.answer:
                parts = row.answer.split(" and ")
                yield [int(part.split(" from ")[1][:2]) for part in parts]

    assert any(order != sorted(order) for order in orders(finds=True))
    mids = [order for order in orders(finds=False) if len(order) == 2]
    assert sum(order == sorted(order) for order in mids) > 0.7 * len(mids)  # by their middles


def test_the_loss_of_a_batch_is_that_of_its_rows(tokenizer, collator):
    """Alone no row is padded; the control: with the places of another shape it is another."""
    torch.manual_seed(0)
    model = build_model(SMALL, tokenizer, seed=0)
    rows = scenes(count=8)
    batch = collator.batch(rows)
    together = loss_of(model, batch)
    alone = sum(loss_of(model, collator.batch([row])) for row in rows)
    assert torch.allclose(together, alone, rtol=1e-4)
    moved = dataclasses.replace(batch.spots, cells=batch.spots.cells.roll(1, dims=0))
    scores = dict.fromkeys((NAME_LAYER, PLACE_LAYER))
    features = see(model, batch)
    batch_logits(model, batch, features, scores)
    other = place_loss(model, features, batch, moved, scores)
    assert abs(float((other - together).detach())) > 0.1


def test_attention_on_the_shape_costs_nothing(collator):
    batch = collator.batch(scenes(count=6, asks=1.0))
    spots = batch.spots
    count = batch.ids.shape[1]

    def away(keys):
        scores = torch.full((len(batch.ids), 2, count, count), -50.0)
        for row, asked, mask in zip(spots.rows, spots.asked, keys, strict=True):
            if asked:
                scores[row, :, :, mask] = 50.0
        asked = batch.predicts[spots.rows] & spots.asked[:, None]
        return float(hints._looks_away(scores, spots, asked)) / int(asked.sum())

    assert away(spots.keys) < 1e-6
    assert away(~spots.keys) > 50


def test_learning_reaches_what_is_told(tokenizer, collator):
    """A few steps lower it; eyes and attention both get a gradient."""
    model = build_model(SMALL, tokenizer, seed=0)
    batch = collator.batch(scenes(count=8))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = float(loss_of(model, batch).detach())
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
    layers = model.model.language_model.layers
    assert layers[NAME_LAYER].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert layers[PLACE_LAYER].self_attn.k_proj.weight.grad.abs().sum() > 0
    assert model.model.visual.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert float(loss.detach()) < 0.8 * first


def test_what_holds_from_which_step():
    rows = Rows(1, (1, 0, 0, 0))
    pretrain._set(rows, pretrain.FINDS_FROM - 1)
    assert (rows.finds, rows.weights) == (False, pretrain.WEIGHTS[0][1])
    pretrain._set(rows, pretrain.FINDS_FROM)
    assert (rows.finds, rows.weights) == (True, pretrain.WEIGHTS[1][1])
