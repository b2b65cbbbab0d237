"""Packed rows attend each to itself, without a mask of all tokens against all."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from tiny_rows import mixed_rows
from vlmtune.batching.collate import pack
from vlmtune.models import attention
from vlmtune.models.attention import Bounds, packed_rows

ROWS = mixed_rows(5, seed=21)


@pytest.fixture(scope="module")
def batch(encoder):
    return pack(encoder.family, [encoder.encode(row) for row in ROWS])


def passes(model, encoder, batch, lengths=None):
    """Logits and all gradients of a forward that is told the rows' lengths."""
    model.zero_grad()
    with packed_rows(lengths or batch.lengths):
        inputs = encoder.family.forward_inputs(batch.inputs)
        logits = model(**inputs, logits_to_keep=batch.predicts).logits
    logits.logsumexp(dim=-1).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach(), torch.cat(gradients).clone()


@pytest.fixture
def masks():
    """The masks that a forward was given, one for each time that the model asked."""
    seen = []
    original = attention.rows_or_mask

    def noting(**arguments):
        seen.append(original(**arguments))
        return seen[-1]

    from transformers import AttentionMaskInterface

    AttentionMaskInterface.register(attention.NAME, noting)
    yield seen
    AttentionMaskInterface.register(attention.NAME, original)


def test_rows_by_their_bounds_are_rows_by_a_mask(model, encoder, batch, masks):
    ours = passes(model, encoder, batch)
    assert any(isinstance(mask, Bounds) for mask in masks)
    assert not any(torch.is_tensor(mask) for mask in masks)
    model.set_attn_implementation("sdpa")
    try:
        stock = passes(model, encoder, batch)
    finally:
        model.set_attn_implementation(attention.NAME)
    for mine, theirs in zip(ours, stock, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_other_bounds_are_other_logits(model, encoder, batch):
    """The control: bounds that lie elsewhere let rows see each other."""
    right = passes(model, encoder, batch)[0]
    original = attention.rows_or_mask

    def shifted(**arguments):
        mask = original(**arguments)
        if not isinstance(mask, Bounds):
            return mask
        first, second, *rest = mask.lengths
        return Bounds((first + second, *rest), mask.cumulative)

    from transformers import AttentionMaskInterface

    AttentionMaskInterface.register(attention.NAME, shifted)
    try:
        wrong = passes(model, encoder, batch)[0]
    finally:
        AttentionMaskInterface.register(attention.NAME, original)
    assert (wrong - right).abs().max() > 1e-3


@pytest.mark.parametrize("lengths", [(7, 9), (1,)])
def test_lengths_that_do_not_add_up_fall_back_to_a_mask(model, encoder, batch, masks, lengths):
    """A forward outside of training is told nothing, or something about another batch."""
    told = passes(model, encoder, batch)[0]
    masks.clear()
    fallen = passes(model, encoder, batch, lengths)[0]
    assert any(torch.is_tensor(mask) for mask in masks)
    assert (fallen - told).abs().max() <= 1e-5 * told.abs().max()


def test_a_row_alone_needs_neither(model, encoder, masks):
    single = pack(encoder.family, [encoder.encode(ROWS[0])])
    passes(model, encoder, single)
    assert masks
    assert all(mask is None for mask in masks)


def test_the_device_is_given_the_running_sum(model, encoder, batch, masks):
    passes(model, encoder, batch)
    bounds = next(mask for mask in masks if isinstance(mask, Bounds))
    assert bounds.cumulative.tolist() == [0, *accumulate(batch.lengths)]


def test_checkpointed_forwards_remember_the_bounds(folder, encoder, batch):
    """Recomputed in the backward, when nobody says the lengths any more."""
    from tiny_rows import lively

    plain, checkpointed = lively(folder), lively(folder)
    checkpointed.train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    mine = passes(checkpointed, encoder, batch)
    theirs = passes(plain.train(), encoder, batch)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


# bf16 on a CPU


def of_rows(module, states, bounds):
    return attention.attend(module, *states, bounds, scaling=0.25)[0]


def of_turned_rows(module, states, bounds):
    """As a model gives them under autocast: what was rotated comes in fp32."""
    query, key, value = states
    with torch.autocast("cpu", torch.bfloat16, enabled=value.dtype is torch.bfloat16):
        turned = (query.float(), key.float()) if value.dtype is torch.bfloat16 else (query, key)
        return of_rows(module, (*turned, value), bounds)


def of_images(module, states, bounds):
    bounds = {"cu_seq_lens_q": bounds.cumulative, "max_length_q": max(bounds.lengths)}
    return attention.attend_segments(module, *states, None, scaling=0.25, **bounds)[0]


def distances(dtype, attend):
    """How far the gradients of a layer's attention in a dtype are from those in float64."""
    torch.manual_seed(3)
    lengths = (37, 64, 20)
    bounds = Bounds(lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))
    heads = (4, 4, 4) if attend is of_images else (4, 2, 2)
    states = [torch.randn(1, count, sum(lengths), 16).bfloat16() for count in heads]
    weights = torch.randn(1, sum(lengths), 4, 16).bfloat16()

    def gradients(number):
        given = [state.detach().to(number, copy=True).requires_grad_() for state in states]
        module = torch.nn.Module()
        module.num_key_value_groups, module.is_causal = heads[0] // heads[1], heads[1] == 2
        output = attend(module, given, bounds)
        assert output.dtype is number
        (output * weights.to(number)).sum().backward()
        return [state.grad for state in given]

    found, truth = gradients(dtype), gradients(torch.float64)
    assert all(mine.dtype is dtype for mine in found)
    return [
        float((mine - theirs).norm() / theirs.norm())
        for mine, theirs in zip(found, truth, strict=True)
    ]


@pytest.mark.parametrize("attend", [of_rows, of_turned_rows, of_images])
def test_gradients_in_bf16_are_rounded_once(attend, monkeypatch):
    """Made in fp32, where torch is faster too; the control: in bf16 they are further off."""
    ours = distances(torch.bfloat16, attend)
    assert max(ours) < 2**-9  # half of the last of 8 bits
    assert max(distances(torch.float32, attend)) < 1e-5
    monkeypatch.setattr(attention, "_is_slow", lambda *_: False)
    stock = distances(torch.bfloat16, attend)
    assert all(mine < theirs for mine, theirs in zip(ours, stock, strict=True))
    assert max(stock) > 2**-9


# The vision tower


@pytest.fixture
def seen_segments(monkeypatch):
    seen = []
    original = attention.attend_segments

    def noting(*states, **arguments):
        seen.append(arguments["cu_seq_lens_q"].tolist())
        return original(*states, **arguments)

    monkeypatch.setattr(attention, "attend_segments", noting)
    return seen


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_images_by_their_bounds_are_images_one_by_one(name, tmp_path, seen_segments):
    """Loss and gradients, with windows (2.5) and DeepStack (3) as without."""
    from tiny_rows import encoder_of, lively
    from vlmtune.testing import tiny

    folder = tiny(name, tmp_path / "tiny", seed=4)
    own = encoder_of(folder)
    batch = pack(own.family, [own.encode(row) for row in ROWS])
    assert own.family.facts.segments
    stock = passes(lively(folder), own, batch)
    assert not seen_segments
    model = lively(folder)
    attention.use_segments(model.get_submodule(own.family.facts.vision_tower))
    found = passes(model, own, batch)
    assert len({tuple(bounds) for bounds in seen_segments}) >= 1
    for mine, theirs in zip(found, stock, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_images_that_see_each_other_are_noticed(folder, encoder, batch, monkeypatch):
    """The control: one bound for all."""
    from tiny_rows import lively

    stock = passes(lively(folder), encoder, batch)[0]
    original = attention.attend_segments

    def together(*states, **arguments):
        arguments["cu_seq_lens_q"] = arguments["cu_seq_lens_q"][[0, -1]]
        return original(*states, **arguments)

    monkeypatch.setattr(attention, "attend_segments", together)
    model = lively(folder)
    attention.use_segments(model.get_submodule(encoder.family.facts.vision_tower))
    assert (passes(model, encoder, batch)[0] - stock).abs().max() > 1e-4
