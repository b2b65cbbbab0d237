"""Activations made again in the backward pass: the same gradients, and none that nobody needs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tiny_rows import asked, encoder_of, lively, picture
from vlmtune.batching.collate import pack
from vlmtune.models.families import load_family
from vlmtune.training.loss import summed_loss
from vlmtune.tuning.apply import apply_tuning
from vlmtune.tuning.config import TuningConfig
from vlmtune.verbs.start import recompute_activations


def adapted(folder, train, dropout=0.0):
    torch.manual_seed(0)
    model, facts = lively(folder), load_family(str(folder)).facts
    config = TuningConfig(targets="all-linear", train=train, rank=2, dropout=dropout)
    tuned = apply_tuning(model, config, facts, base_id="tiny")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.train()
    return model, tuned


def gradients(model, folder):
    encoder = encoder_of(folder)
    rows = [asked("What?", "a red ball", picture(seed=seed)) for seed in (1, 2)]
    batch = pack(encoder.family, [encoder.encode(row) for row in rows])
    seen = []
    hook = model.get_submodule(encoder.family.facts.vision_tower).register_forward_hook(
        lambda *call: seen.append(call[-1][0].requires_grad)
    )
    loss = summed_loss(model, encoder.family, batch)
    loss.backward()
    hook.remove()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    found["loss"] = loss.detach()
    return found, any(seen)


@pytest.mark.parametrize("train", [["language"], ["vision", "projector", "language"]])
def test_gradients_are_the_same_and_a_frozen_tower_has_none(tiny_base, train):
    plain, _ = adapted(tiny_base, train)
    recomputed, _ = adapted(tiny_base, train)
    tower = load_family(str(tiny_base)).facts.vision_tower
    recompute_activations(recomputed, recomputed.get_submodule(tower))
    (expected, _), (found, through_tower) = (gradients(m, tiny_base) for m in (plain, recomputed))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
    assert through_tower == ("vision" in train)


@pytest.mark.parametrize("part", ["vision", "language"])
def test_one_part_alone(tiny_base, part):
    from transformers.modeling_layers import GradientCheckpointingLayer

    everything = ["vision", "projector", "language"]
    plain, _ = adapted(tiny_base, everything)
    recomputed, _ = adapted(tiny_base, everything)
    tower = recomputed.get_submodule(load_family(str(tiny_base)).facts.vision_tower)
    recompute_activations(recomputed, tower, part)
    inside = set(tower.modules())
    layers = [each for each in recomputed.modules() if isinstance(each, GradientCheckpointingLayer)]
    assert {each in inside for each in layers} == {True, False}
    for layer in layers:
        assert layer.gradient_checkpointing == ((layer in inside) == (part == "vision"))
    (expected, _), (found, _) = (gradients(m, tiny_base) for m in (plain, recomputed))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_what_is_dropped_is_dropped_again(tiny_base):
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    tower = load_family(str(tiny_base)).facts.vision_tower
    (plain, _), (again, _), (broken, _) = (adapted(tiny_base, ["language"], 0.3) for _ in range(3))
    for model in (again, broken):
        recompute_activations(model, model.get_submodule(tower))
    for layer in broken.modules():  # the control: other numbers are drawn the second time
        if isinstance(layer, GradientCheckpointingLayer):
            layer._gradient_checkpointing_func = partial(
                checkpoint, use_reentrant=False, preserve_rng_state=False
            )
    found = []
    for model in (plain, again, broken):
        torch.manual_seed(1)
        found.append(gradients(model, tiny_base)[0])
    expected, same, other = found
    for name, gradient in expected.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-5, atol=1e-7)
    assert other["loss"] == expected["loss"]
    apart = [name for name in expected if not torch.allclose(other[name], expected[name])]
    assert len(apart) > len(expected) / 2


def test_left_to_transformers_a_frozen_tower_is_gone_back_through(tiny_base):
    model, _ = adapted(tiny_base, ["language"])
    model.activation_checkpointing_enable({"use_reentrant": False})
    _, through_tower = gradients(model, tiny_base)
    assert through_tower
