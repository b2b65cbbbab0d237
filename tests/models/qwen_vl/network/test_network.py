"""What must hold of the network whatever its weights are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from qwen_vl_network import (
    END,
    PAD,
    QUERIES,
    START,
    batch,
    difference,
    image,
    naive_logits,
    padded,
    pixels,
    text,
    tiny_network,
)

CLOSE, FAR = 2e-5, 1e-3
SEEING = [*text(5), *image(), *text(4, seed=1), *image(seed=1), *text(6, seed=2)]
ROWS = [SEEING, text(9, seed=3), [*image(seed=4), *text(12, seed=5)]]
PICTURES = (2, 0, 1)  # of each row


def rows_and_pixels():
    """Each row with its own images, and all images in reading order."""
    images = pixels(sum(PICTURES))
    own = images.split(list(PICTURES))
    return [(row, mine if len(mine) else None) for row, mine in zip(ROWS, own, strict=True)], images


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# One network, several ways through it


@torch.no_grad()
def test_eager_is_sdpa(tiny):
    ids, images = batch(SEEING), pixels(2)
    found = tiny_network(attention="eager")(ids, pixel_values=images, output_attentions=True)
    assert difference(found.logits, tiny(ids, pixel_values=images).logits) < CLOSE
    weights = torch.stack(found.attentions)
    assert weights.shape == (2, 1, 2, len(SEEING), len(SEEING))
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    assert weights.triu(1).abs().max() == 0


def test_the_attention_of_every_part_can_be_chosen(tiny):
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    from vlmtune.models.qwen_vl.attention import eager_attention

    calls = []

    def counted(module, *arguments, **options):
        calls.append(type(module).__name__)
        return eager_attention(module, *arguments, **options)

    def additive(*arguments, **options):
        mask = sdpa_mask(*arguments, **{**options, "allow_is_causal_skip": False})
        return None if mask is None else torch.where(mask, 0.0, torch.finfo(torch.float32).min)

    AttentionInterface.register("counted", counted)
    AttentionMaskInterface.register("counted", additive)
    with torch.no_grad():
        found = tiny_network(attention="counted")(batch(SEEING), pixel_values=pixels(2)).logits
        assert difference(found, tiny(batch(SEEING), pixel_values=pixels(2)).logits) < CLOSE
    kinds = ["QwenVLVisionAttention"] * 2 + ["CrossAttention"] + ["QwenVLAttention"] * 2
    assert calls == kinds


@torch.no_grad()
def test_text_is_the_naive_network(tiny):
    ids = text(50)
    assert difference(tiny(batch(ids)).logits[0], naive_logits(tiny, ids)) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_cached_is_uncached(tiny, static):
    images, split = pixels(2), len(SEEING) - 5
    whole = tiny(batch(SEEING), pixel_values=images).logits[0]
    cache = StaticCache(config=tiny.config, max_cache_len=64) if static else None
    output = tiny(batch(SEEING[:split]), pixel_values=images, past_key_values=cache, use_cache=True)
    found = [output.logits[0]]
    for token in SEEING[split:]:
        output = tiny(batch([token]), past_key_values=output.past_key_values)
        found.append(output.logits[0])
    assert difference(torch.cat(found), whole) < CLOSE
    assert output.past_key_values.get_seq_length() == len(SEEING)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows_alone(tiny, side):
    rows, images = rows_and_pixels()
    ids, mask = padded(ROWS, side)
    logits = tiny(ids, mask, pixel_values=images).logits
    for index, (row, mine) in enumerate(rows):
        alone = tiny(batch(row), pixel_values=mine).logits[0]
        found = logits[index, -len(row) :] if side == "left" else logits[index, : len(row)]
        assert difference(found, alone) < CLOSE
    wrong = tiny(ids, mask, pixel_values=images.flip(0)).logits[0][mask[0].bool()]
    assert difference(wrong, logits[0][mask[0].bool()]) > FAR


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [False, None])
def test_packed_rows_are_the_rows_alone(attention, use_cache):
    model = tiny_network(attention=attention)
    rows, images = rows_and_pixels()
    lengths = [len(row) for row in ROWS]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = batch([token for row in ROWS for token in row])
    packed = model(ids, position_ids=positions, pixel_values=images, use_cache=use_cache).logits[0]
    for (row, mine), logits in zip(rows, packed.split(lengths), strict=True):
        assert difference(logits, model(batch(row), pixel_values=mine).logits[0]) < CLOSE
    joined = model(ids, pixel_values=images).logits[0]
    assert difference(joined[lengths[0] :], packed[lengths[0] :]) > FAR


@torch.no_grad()
def test_logits_to_keep(tiny):
    ids, mask = padded(ROWS, "right")
    _, images = rows_and_pixels()
    whole = tiny(ids, mask, pixel_values=images).logits
    last = tiny(ids, mask, pixel_values=images, logits_to_keep=3).logits
    assert torch.allclose(last, whole[:, -3:], atol=CLOSE)
    chosen = mask.bool() & (torch.arange(ids.shape[1]) % 3 == 0)
    found = tiny(ids, mask, pixel_values=images, logits_to_keep=chosen).logits
    assert found.shape == (int(chosen.sum()), 96)
    assert difference(found, whole[chosen]) < CLOSE


@torch.no_grad()
def test_embeddings_instead_of_ids(tiny):
    images = pixels(2)
    whole = tiny(batch(SEEING), pixel_values=images)
    embedded = tiny.get_input_embeddings()(batch(SEEING))
    features = tiny.get_image_features(images).pooler_output
    starts = [place for place, token in enumerate(SEEING) if token == START]
    for place, tokens in zip(starts, features, strict=True):
        embedded[0, place + 1 : place + 1 + QUERIES] = tokens
    assert difference(tiny(inputs_embeds=embedded).logits, whole.logits) < CLOSE
    new = [
        tiny.generate(max_new_tokens=5, **inputs)[:, -5:].tolist()
        for inputs in (
            {"inputs_embeds": embedded},
            {"input_ids": batch(SEEING), "pixel_values": images},
        )
    ]
    assert new[0] == new[1]
    for wrong in ({"inputs_embeds": embedded, "input_ids": batch(SEEING)}, {}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            tiny(**wrong)
    with pytest.raises(ValueError, match="images need input_ids"):
        tiny(inputs_embeds=embedded, pixel_values=images)


@torch.no_grad()
def test_features_made_before(tiny):
    ids, images = batch(SEEING), pixels(2)
    expected = tiny(ids, pixel_values=images).logits
    features = tiny.get_image_features(images).pooler_output
    for tokens in (features, list(features)):  # other families of transformers give lists
        ready = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
        assert difference(tiny(ids, mm_encoder_outputs=ready).logits, expected) == 0.0
        found = tiny.generate(ids, mm_encoder_outputs=ready, max_new_tokens=4)
        assert torch.equal(found, tiny.generate(ids, pixel_values=images, max_new_tokens=4))
    swapped = {"image": BaseModelOutputWithPooling(pooler_output=features.flip(0))}
    assert difference(tiny(ids, mm_encoder_outputs=swapped).logits, expected) > FAR
    with pytest.raises(ValueError, match="found both"):
        tiny(ids, pixel_values=images, mm_encoder_outputs=swapped)


# Images and their places


@torch.no_grad()
def test_what_stands_in_the_placeholders_does_not_matter(tiny):
    images, other = pixels(2), list(SEEING)
    for place, token in enumerate(SEEING):
        if token == START:
            other[place + 1 : place + 1 + QUERIES] = [82] * QUERIES
    found = [tiny(batch(ids), pixel_values=images).logits[0] for ids in (SEEING, other)]
    assert torch.equal(*found)
    other[0] = other[0] + 1
    assert difference(tiny(batch(other), pixel_values=images).logits[0], found[0]) > FAR


@torch.no_grad()
def test_images_that_do_not_fit_the_ids_are_refused(tiny):
    cut = [*text(3), *image()[:-4]]
    long = [START, *text(QUERIES + 1), END]
    cases = {"2 complete": (SEEING, 1), "0 complete": (cut, 1), "0 complete ": (long, 1)}
    for found, (ids, count) in cases.items():
        with pytest.raises(ValueError, match=f"hold {found.strip()} images .* and {count} were"):
            tiny(batch(ids), pixel_values=pixels(count))
    with pytest.raises(ValueError, match=r"hold 2 complete images .* and 0 were"):
        tiny(batch(SEEING))  # a path in the placeholders would be opened by the original
    tiny(batch(cut))  # text: a model may write <img> and stop


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 56, 42), "square images"),
        ((3, 56, 56), "square images"),
        ((1, 3, 50, 50), "multiple of 14"),
    ],
)
def test_pixels_of_another_shape_are_refused(tiny, shape, message):
    with pytest.raises(ValueError, match=message):
        tiny(batch([*image(), 3]), pixel_values=torch.zeros(shape))


@torch.no_grad()
def test_a_vision_tower_as_wide_as_the_language_model_has_no_projection():
    from vlmtune.models.qwen_vl.configuration import tiny_config
    from vlmtune.models.qwen_vl.modeling import QwenVLForConditionalGeneration

    config = tiny_config(vocab_size=96, image_start_id=START, vision_width=64)
    model = QwenVLForConditionalGeneration(config).eval()
    assert "transformer.visual.attn_pool.kv_proj.weight" not in model.state_dict()
    assert model(batch(SEEING), pixel_values=pixels(2)).logits.isfinite().all()


# Generation


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_batch_answers_as_its_rows_alone(tiny, options):
    rows, images = rows_and_pixels()
    options = {"max_new_tokens": 8, **options}
    alone = [
        tiny.generate(batch(row), pixel_values=mine, **options)[0, len(row) :].tolist()
        for row, mine in rows
    ]
    ids, mask = padded(ROWS, "left")
    together = tiny.generate(ids, attention_mask=mask, pixel_values=images, **options)
    assert together[:, ids.shape[1] :].tolist() == alone
    swapped = tiny.generate(ids, attention_mask=mask, pixel_values=images.flip(0), **options)
    assert not torch.equal(swapped, together)


@torch.no_grad()
def test_every_sample_sees_the_images_of_its_row(tiny):
    _, images = rows_and_pixels()
    ids, mask = padded(ROWS, "left")
    output = tiny.generate(
        ids,
        attention_mask=mask,
        pixel_values=images,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    alone = tiny(ids, mask, pixel_values=images, logits_to_keep=1).logits[:, 0]
    assert difference(output.logits[0], alone.repeat_interleave(3, dim=0)) < CLOSE


def test_uncached_generation_is_cached(tiny):
    options = {"pixel_values": pixels(2), "max_new_tokens": 6}
    found = [tiny.generate(batch(SEEING), use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*found)


def test_sampling_draws_by_seed(tiny):
    options = {"pixel_values": pixels(2), "max_new_tokens": 8, "do_sample": True, "top_p": 0.9}
    drawn = []
    for seed in (1, 1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            drawn.append(tiny.generate(batch(SEEING), num_return_sequences=2, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_stop_sequences_end_each_row_for_itself(tiny):
    ids, mask = padded([text(9, seed=3), text(7, seed=8)], "left")
    free = tiny.generate(ids, attention_mask=mask, max_new_tokens=10)[:, ids.shape[1] :]
    stop = free[0, 2:4].tolist()
    assert stop not in free[1].unfold(0, 2, 1).tolist()
    options = {"attention_mask": mask, "max_new_tokens": 10, "eos_token_id": 95}
    found = tiny.generate(ids, stop_words_ids=[stop, [95]], **options)[:, ids.shape[1] :]
    assert found[0].tolist() == [*free[0, :4].tolist(), 95, *[PAD] * 5]
    assert found[1].tolist() == free[1].tolist()


def test_a_stop_sequence_in_the_prompt_stops_nothing(tiny):
    ids = text(9, seed=3)
    free = tiny.generate(batch(ids), max_new_tokens=4)
    stops = [ids[-1:], ids[-2:]]
    found = tiny.generate(batch(ids), max_new_tokens=4, stop_words_ids=stops, eos_token_id=95)
    assert torch.equal(found, free)


def test_a_stop_sequence_needs_an_end(tiny):
    with pytest.raises(ValueError, match="no end of sequence"):
        tiny.generate(batch(text(5)), stop_words_ids=[[3]], max_new_tokens=2)


def test_a_prompt_is_read_as_a_whole(tiny):
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        tiny.generate(batch(text(30)), prefill_chunk_size=8, max_new_tokens=2)


# Training


def test_checkpointed_gradients_are_the_plain_ones():
    model = tiny_network().train()
    inputs = {"input_ids": batch(SEEING), "labels": batch(SEEING), "pixel_values": pixels(2)}
    model(**inputs).loss.backward()
    plain = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable()
    runs = []
    for block in (*model.transformer.h, *model.transformer.visual.transformer.resblocks):
        block.attn.register_forward_hook(lambda *_: runs.append(1))
    output = model(**inputs)
    assert output.past_key_values is None
    output.loss.backward()
    assert len(runs) == 2 * 4  # every block twice: forward, and again for the backward
    found = gradients(model)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert len(plain) == sum(p.requires_grad for p in model.parameters())


def test_gradients_reach_adapters_through_checkpoints():
    """What training with LoRA does: everything frozen but something inside a block."""
    model = tiny_network().train()
    model.requires_grad_(False)
    tuned = model.transformer.h[0].attn.c_attn.weight.requires_grad_(True)
    model.activation_checkpointing_enable()
    model(batch(SEEING), labels=batch(SEEING), pixel_values=pixels(2)).loss.backward()
    assert tuned.grad is not None
    assert tuned.grad.abs().max() > 0
    assert gradients(model).keys() == {"transformer.h.0.attn.c_attn.weight"}


def test_packed_gradients_are_the_sum_of_the_rows():
    model = tiny_network().train()
    rows, images = rows_and_pixels()
    for row, mine in rows:
        logits = model(batch(row), pixel_values=mine).logits[0, :-1]
        nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum").backward()
    alone = gradients(model)
    model.zero_grad()
    lengths = [len(row) for row in ROWS]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    predicts = torch.cat([torch.arange(length) < length - 1 for length in lengths])[None]
    logits = model(
        batch([token for row in ROWS for token in row]),
        position_ids=positions,
        pixel_values=images,
        logits_to_keep=predicts,
        use_cache=False,
    ).logits
    targets = torch.tensor([token for row in ROWS for token in row[1:]])
    nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    found = gradients(model)
    assert found.keys() == alone.keys()
    for name, gradient in alone.items():
        scale = float(gradient.abs().max())
        assert difference(found[name], gradient) < 1e-4 * max(scale, 1e-3), name
