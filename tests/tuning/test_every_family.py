"""QLoRA of every family's tiny model, all three parts: trained, reloaded, merged with proof."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tiny_world import tiny_recipe
from vlmtune.models.families import load_family
from vlmtune.models.load import LoadingConfig, load_model
from vlmtune.models.quantize import quantized_layers, within
from vlmtune.runs.resolve import open_model, resolve
from vlmtune.testing import FAMILIES, tiny
from vlmtune.tuning.config import PARTS
from vlmtune.verbs.merge import merge
from vlmtune.verbs.train import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_over_4_bits_in_fp16_and_merged(family, tmp_path, tiny_data):
    base = tiny(family, tmp_path / "base")
    facts = load_family(str(base)).facts
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    adaptable = any(
        isinstance(module, nn.Linear) and within(name, facts.projector)
        for name, module in model.named_modules()
    )
    tuning = {"method": "qlora", "rank": 4, "alpha": 8, "targets": "all-linear", "train": PARTS}
    if not adaptable:  # its projection is a bare matrix
        tuning["modules_to_save"] = [name.rsplit(".", 1)[-1] for name in facts.projector]
    recipe = tiny_recipe(
        base,
        tiny_data,
        tuning=tuning,
        image={},
        training__max_steps=2,
        training__precision="fp16",
    )
    train(recipe, run_dir=tmp_path / "run")
    opened = open_model(resolve(tmp_path / "run"), LoadingConfig(device="cpu"))
    layers = quantized_layers(opened.model, "nf4")
    kept = (facts.vision_tower, *facts.projector)
    assert layers
    assert not any(within(name, kept) for name in layers)
    assert opened.contract.trained == PARTS
    result = merge(tmp_path / "run", tmp_path / "model", dtype="fp32", device="cpu")
    assert all(result["changed"].values())
    assert result["max_logit_difference"] < 1e-4
