"""Activations made again in the backward pass: the same gradients, and none that nobody needs."""

from __future__ import annotations

import pytest
import torch

from tiny_rows import asked, encoder_of, lively, picture
from vlmtune.batching.collate import pack
from vlmtune.models.families import load_family
from vlmtune.training.loss import summed_loss
from vlmtune.tuning.apply import apply_tuning
from vlmtune.tuning.config import TuningConfig
from vlmtune.verbs.start import recompute_activations


def adapted(folder, train):
    torch.manual_seed(0)
    model, facts = lively(folder), load_family(str(folder)).facts
    config = TuningConfig(targets="all-linear", train=train, rank=2, dropout=0.0)
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
    summed_loss(model, encoder.family, batch).backward()
    hook.remove()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
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


def test_left_to_transformers_a_frozen_tower_is_gone_back_through(tiny_base):
    model, _ = adapted(tiny_base, ["language"])
    model.activation_checkpointing_enable({"use_reentrant": False})
    _, through_tower = gradients(model, tiny_base)
    assert through_tower
