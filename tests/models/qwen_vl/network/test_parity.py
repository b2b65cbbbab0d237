"""The network is the original's: everything that the original computed from a tiny checkpoint."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from qwen_vl_network import batch, difference

LOGITS, STAGES = 1e-4, 1e-5
PROMPTS = ("text", "one", "two", "gray_rgba")


def logits_of(model, original, prompt):
    with torch.no_grad():
        output = model(batch(original.ids(prompt)), pixel_values=original.images_of(prompt))
    return output.logits[0, original.facts["prompts"][prompt]["logit_positions"]]


# The vision tower


def test_pixels(original):
    assert difference(original.images("a"), original.tensors["vis.pixels_a"]) == 0.0
    expected = original.facts["pixels_b_checksum"]
    found = original.images("b").double()
    assert float(found.sum()) == pytest.approx(expected["sum"], abs=1e-6)
    assert float(found.abs().sum()) == pytest.approx(expected["abs_sum"], abs=1e-6)


@torch.no_grad()
def test_stages_of_the_vision_tower(original, network):
    tower, stages = network.transformer.visual, {}
    with recording({"patch": tower.conv1, "ln_pre": tower.ln_pre, "pool": tower.attn_pool}, stages):
        output = network.get_image_features(original.images("a"))
    found = {
        "patch": stages["patch"].flatten(2).transpose(1, 2),
        "ln_pre": stages["ln_pre"],
        "blocks": output.last_hidden_state,
        "pool": stages["pool"][:, :: original.stride],
    }
    for stage, values in found.items():
        assert difference(values, original.tensors[f"vis.a.{stage}"]) < STAGES, stage


@torch.no_grad()
def test_features_of_all_pictures(original, network):
    found = network.get_image_features(original.images(*"abgr")).pooler_output
    assert difference(found[:, :: original.stride], original.tensors["vis.out"]) < STAGES


@torch.no_grad()
@pytest.mark.parametrize("side", [224, 448])  # 224: the positions' own grid; 448: interpolated
def test_features_of_other_sizes(original, network, side):
    waves = torch.sin(torch.arange(3 * side * side, dtype=torch.float64) * 0.013)
    found = network.get_image_features(waves.float().view(1, 3, side, side)).pooler_output
    assert difference(found[:, :: original.stride], original.tensors[f"vis.syn{side}.out"]) < STAGES


@contextmanager
def recording(modules, into):
    hooks = [
        module.register_forward_hook(lambda *call, name=name: into.update({name: call[-1]}))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# Logits


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits(original, network, prompt):
    found = logits_of(network, original, prompt)
    assert difference(found, original.tensors[f"logits.{prompt}"]) < LOGITS


@torch.no_grad()
def test_hidden_states(original, network):
    output = network(
        batch(original.ids("one")),
        pixel_values=original.images("a"),
        output_hidden_states=True,
    )
    found = torch.stack(output.hidden_states)[:, 0, -1]
    assert difference(found, original.tensors["hidden.one.last_pos"]) < LOGITS


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches(original, network, side):
    prompts = ("one", "text", "two")
    ids, mask = original.padded(prompts, side)
    logits = network(ids, mask, pixel_values=original.images_of(*prompts)).logits
    last = mask.sum(1) - 1 if side == "right" else torch.full((3,), ids.shape[1] - 1)
    found = logits[torch.arange(3), last]
    assert difference(found, original.tensors[f"batch.{side}.last_logits"]) < LOGITS
    unmasked = network(ids, pixel_values=original.images_of(*prompts)).logits
    changed = difference(unmasked[torch.arange(3), last], found)
    assert (changed > 100 * LOGITS) is (side == "left")  # behind a text, padding is never seen


@pytest.mark.parametrize("ntk", [0, 1])
@pytest.mark.parametrize("logn", [0, 1])
def test_long_context_switches(original, ntk, logn):
    model = original.load()
    model.config.use_dynamic_ntk, model.config.use_logn_attn = bool(ntk), bool(logn)
    expected = original.tensors[f"logits.one.ntk{ntk}_logn{logn}"]
    assert difference(logits_of(model, original, "one")[-1:], expected) < LOGITS


@torch.no_grad()
def test_bfloat16_is_near(original):
    model = original.load(dtype=torch.bfloat16)
    ids, images = batch(original.ids("one")), original.images("a")
    found = model(ids, pixel_values=images, logits_to_keep=3).logits[0]
    assert difference(found, original.tensors["bf16.logits.one.last"]) < 0.1
    features = model.get_image_features(images).pooler_output[:, :: original.stride]
    assert difference(features, original.tensors["bf16.vis.a"]) < 0.1


# What the bounds see: a network with one thing wrong is not the original's.


def _tanh_gelu(model, patch):  # noqa: ARG001
    exact = nn.functional.gelu
    patch(nn.functional, "gelu", lambda states: exact(states, approximate="tanh"))


def _wrong_gate(model, patch):  # noqa: ARG001
    for block in model.transformer.h:
        block.mlp.w1, block.mlp.w2 = block.mlp.w2, block.mlp.w1


def _heads_in_blocks(model, patch):  # noqa: ARG001
    def in_blocks(values):
        return values.unflatten(0, (model.config.vision.heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    for block in model.transformer.visual.transformer.resblocks:
        projection = block.attn.in_proj
        projection.weight = nn.Parameter(in_blocks(projection.weight))
        projection.bias = nn.Parameter(in_blocks(projection.bias))


def _no_positions(model, patch):  # noqa: ARG001
    from vlmtune.models.qwen_vl import vision

    patch(vision, "resized_grid", lambda plane, places: plane.new_zeros(places, plane.shape[1]))


@pytest.mark.parametrize("mistake", [_tanh_gelu, _wrong_gate, _heads_in_blocks, _no_positions])
def test_a_mistake_is_seen(original, monkeypatch, mistake):
    model = original.load()
    mistake(model, monkeypatch.setattr)
    assert difference(logits_of(model, original, "one"), original.tensors["logits.one"]) > LOGITS


# Answers


def answer(model, original, *prompts, **options):
    ids, mask = original.padded(prompts, "left")
    images = original.images_of(*prompts)
    output = model.generate(ids, attention_mask=mask, pixel_values=images, **options)
    return output[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prompt", ["text", "one", "two"])
def test_greedy(original, network, prompt):
    ids = batch(original.ids(prompt))
    output = network.generate(
        ids,
        pixel_values=original.images_of(prompt),
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[0, ids.shape[1] :].tolist() == original.facts["greedy"][prompt]
    found = torch.cat(output.scores[:6])
    assert difference(found, original.tensors[f"greedy_scores.{prompt}"]) < LOGITS


def test_greedy_of_a_left_padded_batch(original, network):
    expected = original.facts["greedy_left_padded"]
    found = answer(network, original, *expected["prompts"], max_new_tokens=10)
    assert found == expected["new_ids"]


@pytest.mark.parametrize("case", ["greedy_stop", "greedy_stop2"])
def test_stop_sequences(original, network, case):
    expected = original.facts[case]
    stops = expected["stop_words_ids"]
    [found] = answer(network, original, expected["prompt"], stop_words_ids=stops)
    assert found == expected["new_ids"]
    config = GenerationConfig(max_new_tokens=16)  # what it leaves open is the model's own
    [again] = answer(
        network, original, expected["prompt"], stop_words_ids=stops, generation_config=config
    )
    assert again == found
    [unstopped] = answer(network, original, expected["prompt"])
    assert unstopped[: len(found)] != found


def test_beams(original, network):
    expected = original.facts["beam3"]
    [found] = answer(network, original, expected["prompt"], num_beams=3, max_new_tokens=8)
    assert found == expected["new_ids"]
    [greedy] = answer(network, original, expected["prompt"], max_new_tokens=8)
    assert greedy != found


# Training


@pytest.mark.parametrize("case", ["img", "txt", "both"])
def test_loss_and_every_gradient(original, case):
    model, expected = original.load().train(), original.facts["train"][case]
    loss = model(**original.training_batch(case)).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected["loss"], abs=1e-6)
    norms = {
        name: None if parameter.grad is None else float(parameter.grad.double().norm())
        for name, parameter in model.named_parameters()
    }
    assert norms.keys() == expected["grad_norms"].keys()
    for name, norm in expected["grad_norms"].items():
        if not norm:  # frozen, or no image there: the original ran one for nothing
            assert not norms[name], name
        else:
            assert norms[name] == pytest.approx(norm, rel=1e-5), name


def test_training_loss_is_the_evaluation_loss_where_nothing_is_long(original, network):
    with torch.no_grad():
        loss = network(**original.training_batch("img")).loss
    assert float(loss) == pytest.approx(original.facts["train"]["img_loss_in_eval_mode"], abs=1e-6)


def test_four_steps_of_adamw(original):
    train = original.facts["train"]
    expected, model = train["adamw_trajectory"], original.load().train()
    model.transformer.visual.requires_grad_(False)
    model.transformer.visual.attn_pool.requires_grad_(True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(trained) == sorted(train["trainable_fix_vit_full"])
    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=expected["lr"],
        betas=expected["betas"],
        eps=expected["eps"],
        weight_decay=expected["weight_decay_on_all_trainable"],
    )
    losses = []
    for _ in expected["losses_before_each_step"]:
        loss = model(**original.training_batch("img")).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), expected["clip"])
        optimizer.step()
    assert losses == pytest.approx(expected["losses_before_each_step"], abs=1e-5)
    assert losses[0] - losses[-1] > 1
