"""Packed = alone: a row in a pack sees itself only, and weighs what it weighs alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from tiny_rows import asked, mixed_rows, picture
from vlmtune.batching.collate import pack
from vlmtune.models.encode import IGNORED
from vlmtune.training.loss import label_logits, mean_loss, summed_loss

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
RELATIVE = 1e-5  # of the largest gradient of the tensor


@pytest.fixture(scope="module")
def rows(encoder):
    """Eight rows with 0 to 3 images; the first has none."""
    encoded = [encoder.encode(row) for row in mixed_rows(7, seed=11)]
    assert len({len(row.vision.get("image_grid_thw", ())) for row in encoded}) > 2
    return [encoder.encode(asked("Hello there", "A text alone.")), *encoded]


def reference_batch(rows, pad):
    """The same rows as everybody batches them: padded right, masked, unshifted labels."""
    longest = max(len(row.tokens) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for place, row in enumerate(rows):
        length = len(row.tokens)
        ids[place, :length] = torch.from_numpy(row.tokens.ids)
        labels[place, :length] = torch.from_numpy(row.tokens.labels)
        kinds[place, :length] = torch.from_numpy(row.tokens.image_mask)
        mask[place, :length] = 1
    vision = [row.vision for row in rows if row.vision]
    joined = {name: torch.cat([one[name] for one in vision]) for name in (vision or [{}])[0]}
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, **joined}
    return {**batch, "mm_token_type_ids": kinds.int()} if joined else batch


def reference_loss(model, encoder, rows):
    """Stock transformers: positions, masks, shift and mean are all its own."""
    return model(**reference_batch(rows, encoder.family.token_id("<|endoftext|>"))).loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def accumulated(model, encoder, packs):
    """One optimizer step in several forwards, as the loop does it."""
    batches = [pack(encoder.family, rows) for rows in packs]
    labels = sum(batch.labels for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = summed_loss(model, encoder.family, batch) / labels
        loss.backward()
        total += float(loss.detach())
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def largest_difference(ours, theirs):
    return max(
        float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max())
        for name in theirs
        if theirs[name].abs().max() > 0
    )


# Positions


def reference_positions(model, row):
    """``get_rope_index`` of stock transformers, given one row alone: (3, tokens)."""
    if not row.vision:
        return torch.arange(len(row.tokens)).expand(3, -1)
    kinds = torch.from_numpy(row.tokens.image_mask).int()[None]
    positions, _ = model.model.get_rope_index(
        torch.from_numpy(row.tokens.ids)[None], kinds, row.vision["image_grid_thw"]
    )
    return positions[:, 0]


def test_positions_are_the_references_row_by_row(model, encoder):
    for mixed in mixed_rows(40, seed=12):
        row = encoder.encode(mixed)
        assert row.positions.shape == (4, len(row.tokens))
        assert torch.equal(row.positions[0], torch.arange(len(row.tokens)))
        assert torch.equal(row.positions[1:], reference_positions(model, row))


def test_positions_start_anew_with_every_row_of_a_pack(model, encoder, rows):
    batch = pack(encoder.family, rows)
    inputs = encoder.family.forward_inputs(batch.inputs)
    assert inputs["position_ids"].shape == (4, 1, batch.tokens)
    assert inputs["use_cache"] is False
    assert "attention_mask" not in inputs
    start = 0
    for row, length in zip(rows, batch.lengths, strict=True):
        inside = inputs["position_ids"][:, 0, start : start + length]
        assert torch.equal(inside[1:], reference_positions(model, row))
        assert inside[0, 0] == 0
        start += length


# Logits


def test_logits_of_a_pack_are_those_of_each_row_alone(model, encoder, rows):
    """And those of the stock model, which is given no positions of ours."""
    packed = label_logits(model, encoder.family, pack(encoder.family, rows))
    alone = [label_logits(model, encoder.family, pack(encoder.family, [row])) for row in rows]
    torch.testing.assert_close(packed, torch.cat(alone), **CLOSE)
    pad = encoder.family.token_id("<|endoftext|>")
    stock = []
    for row in rows:
        inputs = reference_batch([row], pad)
        following = inputs.pop("labels")[0, 1:]
        stock.append(model(**inputs).logits[0, :-1][following != IGNORED])
    torch.testing.assert_close(packed, torch.cat(stock), **CLOSE)


def test_the_order_of_a_pack_does_not_matter(model, encoder, rows):
    forth = label_logits(model, encoder.family, pack(encoder.family, rows)).split(counts(rows))
    back = label_logits(model, encoder.family, pack(encoder.family, rows[::-1]))
    for ours, theirs in zip(forth, reversed(back.split(counts(rows[::-1]))), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def counts(rows):
    return [row.tokens.trained for row in rows]


def perturbed(row, what):
    if what == "pixels":
        vision = {**row.vision, "pixel_values": row.vision["pixel_values"] + 1}
        return replace(row, vision=vision)
    ids = row.tokens.ids.copy()
    ids[3:6] = (ids[3:6] + 7) % 200
    return replace(row, tokens=replace(row.tokens, ids=ids))


@pytest.mark.parametrize("what", ["pixels", "tokens"])
def test_a_changed_row_leaves_its_neighbours_bits(model, encoder, rows, what):
    place = next(i for i, row in enumerate(rows) if row.vision and 0 < i < len(rows) - 1)
    other = [*rows[:place], perturbed(rows[place], what), *rows[place + 1 :]]
    before, after = (
        label_logits(model, encoder.family, pack(encoder.family, each)).split(counts(rows))
        for each in (rows, other)
    )
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(old, new) is (index != place)


def test_three_rows_of_positions_mix_the_neighbours(model, encoder, rows):
    """The control: without the row that counts tokens, the same pack is contaminated, silently."""
    batch = pack(encoder.family, rows)
    inputs = encoder.family.forward_inputs(batch.inputs)
    inputs["position_ids"] = inputs["position_ids"][1:]
    mixed = model(**inputs, logits_to_keep=batch.predicts).logits
    right = label_logits(model, encoder.family, batch)
    assert (mixed - right).abs().max() > 1e-3
    first = rows[0].tokens.trained
    torch.testing.assert_close(mixed[:first], right[:first], **CLOSE)  # nothing stands before it


def test_logits_of_labels_alone_give_the_full_cross_entropy(model, encoder, rows):
    batch = pack(encoder.family, rows)
    inputs = encoder.family.forward_inputs(batch.inputs)
    full = model(**inputs).logits[0]  # (tokens, vocabulary)
    labels = torch.full((batch.tokens,), IGNORED)
    labels[batch.predicts[0]] = batch.targets
    whole = cross_entropy(full, labels, reduction="sum", ignore_index=IGNORED)
    ours = summed_loss(model, encoder.family, batch)
    torch.testing.assert_close(ours, whole, rtol=1e-6, atol=0)
    assert label_logits(model, encoder.family, batch).shape == (batch.labels, full.shape[-1])


# Loss and gradients


def test_packed_padded_cut_and_one_by_one_are_one_step(model, encoder, rows):
    reference = reference_loss(model, encoder, rows)
    expected = gradients(model, reference)
    cuts = {
        "one pack": [rows],
        "2 packs of 4": [rows[:4], rows[4:]],
        "4 packs of 2": [rows[place : place + 2] for place in range(0, 8, 2)],
        "one by one": [[row] for row in rows],
    }
    for name, packs in cuts.items():
        loss, found = accumulated(model, encoder, packs)
        assert loss == pytest.approx(float(reference.detach()), rel=1e-6), name
        assert largest_difference(found, expected) < RELATIVE, name
    assert mean_loss(model, encoder.family, [pack(encoder.family, rows)]) == pytest.approx(
        float(reference.detach()), rel=1e-6
    )


def test_a_mean_of_means_is_another_step(model, encoder, rows):
    """The control: packs of unequal label counts, each averaged for itself."""
    uneven = sorted(rows, key=lambda row: row.tokens.trained)
    halves = uneven[:4], uneven[4:]
    true = reference_loss(model, encoder, rows)
    wrong = sum(reference_loss(model, encoder, half) for half in halves) / 2
    assert abs(float(true.detach()) - float(wrong.detach())) > 1e-4
    difference = largest_difference(gradients(model, wrong), gradients(model, true))
    assert difference > 100 * RELATIVE


def test_the_last_token_of_a_row_predicts_nothing(encoder, rows):
    batch = pack(encoder.family, rows)
    ends = torch.tensor(batch.lengths).cumsum(0) - 1
    assert not batch.predicts[0, ends].any()
    following = torch.cat([torch.from_numpy(row.tokens.ids) for row in rows])[1:]
    assert torch.equal(batch.targets, following[batch.predicts[0, :-1]])
    assert batch.ids == tuple(row.id for row in rows)


def test_a_label_shifted_after_joining_is_seen(model, encoder, rows):
    """The control: a row that begins with a label, shifted over the boundary, is learnt from."""
    first, second = rows[1], rows[2]
    labels = second.tokens.labels.copy()
    labels[0] = second.tokens.ids[0]
    second = replace(second, tokens=replace(second.tokens, labels=labels))
    batch = pack(encoder.family, [first, second])
    assert batch.labels == first.tokens.trained + second.tokens.trained - 1
    joined = torch.cat([torch.from_numpy(row.tokens.labels) for row in (first, second)])
    following = torch.cat([joined[1:], torch.tensor([IGNORED])])
    naive = replace(
        batch, predicts=(following != IGNORED)[None], targets=following[following != IGNORED]
    )
    assert naive.labels == batch.labels + 1
    with torch.no_grad():
        right, wrong = (float(summed_loss(model, encoder.family, each)) for each in (batch, naive))
    assert wrong - right > 1


def test_a_batch_moves_whole(encoder, rows):
    batch = pack(encoder.family, rows).to(torch.device("meta"))
    tensors = [*batch.inputs.values(), batch.predicts, batch.targets]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.lengths == pack(encoder.family, rows).lengths


def test_a_pack_of_texts_alone(model, encoder):
    texts = [encoder.encode(asked("Hi", "x" * n)) for n in (1, 5)]
    batch = pack(encoder.family, texts)
    assert set(batch.inputs) == {"input_ids", "image_mask", "positions"}
    alone = [label_logits(model, encoder.family, pack(encoder.family, [row])) for row in texts]
    torch.testing.assert_close(
        label_logits(model, encoder.family, batch), torch.cat(alone), **CLOSE
    )


def test_pictures_reach_their_own_rows(model, encoder):
    """Two rows that differ in their picture alone; swapped pictures swap the logits."""
    red, green = picture((56, 56), colour="red"), picture((56, 56), colour="lime")
    a, b = (encoder.encode(asked("Which?", "x", image)) for image in (red, green))
    ab = label_logits(model, encoder.family, pack(encoder.family, [a, b])).chunk(2)
    ba = label_logits(model, encoder.family, pack(encoder.family, [b, a])).chunk(2)
    torch.testing.assert_close(ab[0], ba[1], **CLOSE)
    torch.testing.assert_close(ab[1], ba[0], **CLOSE)
    assert (ab[0] - ab[1]).abs().max() > 1e-4
