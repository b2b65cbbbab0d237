"""Dynamic NTK and logn attention against the formulas, at lengths that cross ``seq_length``."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from qwen_vl_network import batch, difference, naive_logits, padded, text, tiny_network
from vlmtune.models.qwen_vl.rotary import logn_scale, ntk_alpha, ntk_levels

SEQ = 16
LENGTHS = (1, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100)
CLOSE, FAR = 1e-4, 1e-2


@pytest.fixture(scope="module")
def short():
    """A network trained, as it were, on 16 tokens. Read only."""
    return tiny_network(seq_length=SEQ)


@pytest.mark.parametrize("seq_length", [16, 2048])
def test_levels_are_the_formula(seq_length):
    lengths = sorted(
        {1, 5 * seq_length, *(seq_length * 2**k + d for k in range(6) for d in (-1, 0, 1))}
    )
    for length in lengths:
        [levels] = ntk_levels(torch.arange(length)[None], seq_length)
        assert len(set(levels.tolist())) == 1
        formula = max(2 ** math.ceil(math.log2(length / seq_length) + 1) - 1, 1)
        assert ntk_alpha(int(levels[0])) == formula, length


def test_levels_of_packed_sequences_are_their_own():
    lengths = (40, 3, 17, 16)
    packed = torch.cat([torch.arange(length) for length in lengths])[None]
    [levels] = ntk_levels(packed, SEQ)
    alone = [int(ntk_levels(torch.arange(length)[None], SEQ)[0, 0]) for length in lengths]
    assert [part.unique().tolist() for part in levels.split(lengths)] == [[k] for k in alone]
    assert alone == [2, 0, 1, 0]


def test_logn_scale_is_the_formula():
    scale = logn_scale(torch.arange(100)[None], SEQ).flatten().tolist()
    assert scale[:SEQ] == [1.0] * SEQ
    for place in range(SEQ + 1, 101):
        assert scale[place - 1] == pytest.approx(math.log(place) / math.log(SEQ), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_logits_are_the_formulas(short, length):
    ids = text(length)
    found = short(batch(ids)).logits[0]
    assert difference(found, naive_logits(short, ids)) < CLOSE
    plain = difference(found, naive_logits(short, ids, evaluation=False))
    assert (plain > FAR) is (length > SEQ)


@torch.no_grad()
@pytest.mark.parametrize("switched_off", ["use_dynamic_ntk", "use_logn_attn"])
def test_each_can_be_switched_off(switched_off):
    model, ids = tiny_network(seq_length=SEQ), text(40)
    both = model(batch(ids)).logits[0]
    setattr(model.config, switched_off, False)
    found = model(batch(ids)).logits[0]
    assert difference(found, naive_logits(model, ids)) < CLOSE
    assert difference(found, both) > FAR


@torch.no_grad()
def test_what_follows_a_prompt_keeps_its_base(short):
    """14 tokens of prompt and 30 more, past twice the length: the base is still the prompt's."""
    ids, prompt = text(44), 14
    output = short(batch(ids[:prompt]), use_cache=True)
    found = [output.logits[0]]
    for token in ids[prompt:]:
        cache = output.past_key_values
        output = short(batch([token]), past_key_values=cache, use_cache=True)
        found.append(output.logits[0])
    logits = torch.cat(found)
    assert difference(logits, naive_logits(short, ids, prompt=prompt)) < CLOSE
    assert difference(logits, naive_logits(short, ids)) > FAR


@torch.no_grad()
def test_several_tokens_after_a_prompt(short):
    ids = text(60, seed=2)
    output = short(batch(ids[:20]), use_cache=True)
    found = [output.logits[0]]
    for start, end in pairwise((20, 35, 36, 60)):
        output = short(batch(ids[start:end]), past_key_values=output.past_key_values)
        found.append(output.logits[0])
    assert difference(torch.cat(found), naive_logits(short, ids, prompt=20)) < CLOSE


def test_generation_is_the_formulas(short):
    ids, new = text(30, seed=3), 12
    output = short.generate(
        batch(ids), max_new_tokens=new, output_logits=True, return_dict_in_generate=True
    )
    whole = output.sequences[0].tolist()
    expected = naive_logits(short, whole[:-1], prompt=len(ids))[len(ids) - 1 :]
    assert difference(torch.cat(output.logits), expected) < CLOSE


@torch.no_grad()
def test_nothing_leaks_from_one_call_into_the_next():
    """In the original a long prompt in evaluation changes the training that comes after it."""
    model, long, row = tiny_network(seq_length=SEQ), text(90), text(40, seed=4)
    fresh = model(batch(row[:10])).logits
    stretched = model(batch(long)).logits
    model.generate(batch(long), max_new_tokens=2)
    assert torch.equal(model(batch(row[:10])).logits, fresh)
    trained = model.train()(batch(row)).logits[0]
    assert difference(trained, naive_logits(model, row, evaluation=False)) < CLOSE
    model.eval()
    assert torch.equal(model(batch(long)).logits, stretched)


@torch.no_grad()
def test_without_positions_padding_counts_as_in_the_original(short):
    rows = [text(30), text(10, seed=1)]
    ids, mask = padded(rows, "left")
    found = short(ids, mask).logits[1, -10:]
    by_place = naive_logits(short, ids[1].tolist(), padding=20)[-10:]
    assert difference(found, by_place) < CLOSE
    assert difference(found, naive_logits(short, rows[1])) > FAR


@torch.no_grad()
def test_with_positions_a_padded_row_is_the_row_alone(short):
    rows = [text(70), text(10, seed=1), text(33, seed=2)]
    ids, mask = padded(rows, "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = short(ids, mask, positions).logits
    for index, row in enumerate(rows):
        assert difference(logits[index, -len(row) :], naive_logits(short, row)) < CLOSE


@pytest.mark.parametrize("beams", [1, 3])
def test_a_padded_batch_answers_as_its_rows_alone(short, beams):
    rows = [text(70), text(10, seed=1), text(33, seed=2)]
    options = {"max_new_tokens": 12, "num_beams": beams}
    alone = [short.generate(batch(row), **options)[0, len(row) :].tolist() for row in rows]
    ids, mask = padded(rows, "left")
    together = short.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    assert together == alone
    # The original counts padding: what its positions give is another answer.
    places = torch.arange(ids.shape[1]).expand(len(rows), -1)
    counted = short.generate(ids, attention_mask=mask, position_ids=places, **options)
    assert counted[:, ids.shape[1] :].tolist() != alone


@torch.no_grad()
def test_packed_rows_are_the_rows_alone_however_long(short):
    rows = [text(70), text(10, seed=1), text(33, seed=2)]
    ids = batch([token for row in rows for token in row])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = short(ids, position_ids=positions).logits[0].split([len(row) for row in rows])
    for row, logits in zip(rows, packed, strict=True):
        assert difference(logits, naive_logits(short, row)) < CLOSE
    joined = short(ids).logits[0].split([len(row) for row in rows])
    assert difference(joined[1], packed[1]) > FAR
