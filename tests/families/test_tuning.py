"""Adapters on the language model, on the vision tower, on all parts: they learn, and they merge."""

from __future__ import annotations

import pytest
import torch

from tiny_rows import asked, lively, picture
from vlmtune.batching.collate import pack
from vlmtune.models.quantize import within
from vlmtune.training.distributed.strategy import norms_of
from vlmtune.training.loss import label_logits, summed_loss
from vlmtune.training.trainability import TrainabilityProof
from vlmtune.tuning.apply import apply_tuning, load_adapter
from vlmtune.tuning.config import PARTS, TuningConfig
from vlmtune.tuning.merge import changed, digests, merge_adapter
from vlmtune.tuning.parts import part_of

ROWS = [asked("What is it?", "A circle.", picture((56, 42), seed=seed)) for seed in range(3)]
CHOICES = {"language": ("language",), "vision": ("vision",), "all": PARTS}


def batches(encoder):
    """Forwards of the rows, one a row: every family takes them so."""
    return [pack(encoder.family, [encoder.encode(row)]) for row in ROWS]


@torch.no_grad()
def logits(model, encoder):
    model.eval()
    return torch.cat([label_logits(model, encoder.family, batch) for batch in batches(encoder)])


def adaptable(model, facts, part):
    """Whether a part has linear layers to put adapters in; Gemma3's projection is a bare matrix."""
    return any(
        isinstance(module, torch.nn.Linear) and part_of(f"{name}.weight", facts) == part
        for name, module in model.named_modules()
    )


def tuned_on(folder, facts, parts):
    model = lively(folder)
    config = TuningConfig(
        method="lora",
        rank=4,
        alpha=16,
        dropout=0.0,
        targets="all-linear",
        train=tuple(part for part in parts if adaptable(model, facts, part)),
    )
    torch.manual_seed(0)
    return apply_tuning(model, config, facts, base_id="tiny"), config.train


def steps(tuned, encoder, count=3):
    """A few optimizer steps; the loss of each, and the proof of the first."""
    parameters = tuned.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), lr=5e-3)
    proof = TrainabilityProof(tuned.model, encoder.family.facts, parameters)
    losses = []
    tuned.model.train()
    for number in range(1, count + 1):
        total = sum(summed_loss(tuned.model, encoder.family, batch) for batch in batches(encoder))
        total.backward()
        if not proof.complete:
            proof.observe(number, norms_of(parameters), images=True)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    return losses, proof


@pytest.mark.parametrize("choice", CHOICES)
def test_adapters_learn_are_saved_and_merge(folder, encoder, tmp_path, choice):
    facts = encoder.family.facts
    tuned, parts = tuned_on(folder, facts, CHOICES[choice])
    losses, proof = steps(tuned, encoder)
    assert losses[-1] < losses[0]
    trained = {row.part for row in proof.rows if row.gradient_norm}
    assert trained == set(parts)
    assert {part_of(name, facts) for name in tuned.trainable()} == set(parts)
    expected = logits(tuned.model, encoder)

    tuned.adapter.save_pretrained(tmp_path, save_embedding_layers=False)
    again = load_adapter(lively(folder), tmp_path, trainable=False)
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits(again.model, encoder), expected, rtol=0, atol=1e-6 * scale)

    before = digests(lively(folder), torch.float32)
    merged = merge_adapter(again)
    torch.testing.assert_close(logits(merged, encoder), expected, rtol=0, atol=1e-4 * scale)
    counts = changed(before, digests(merged, torch.float32), facts)
    assert {part for part, count in counts.items() if count} == set(parts)


def test_a_merge_that_loses_the_tower_is_seen(folder, encoder):
    """The control: without the tower's adapter the logits are others, and no tensor of it moved."""
    facts = encoder.family.facts
    tuned, parts = tuned_on(folder, facts, ("vision", "language"))
    steps(tuned, encoder)
    expected = logits(tuned.model, encoder)
    for name, parameter in tuned.model.named_parameters():
        if "lora_B" in name and within(name, (facts.vision_tower,)):
            parameter.data.zero_()
    before = digests(lively(folder), torch.float32)
    merged = merge_adapter(tuned)
    assert (logits(merged, encoder) - expected).abs().max() > 1e-3
    counts = changed(before, digests(merged, torch.float32), facts)
    assert "vision" in parts
    assert not counts["vision"]
