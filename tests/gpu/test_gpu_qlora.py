"""QLoRA on a GPU: its kernels are others than those of the CPU. Not run without one."""

from __future__ import annotations

import pytest
import torch

from tiny_world import MakeRecipe
from vlmtune.models.load import LoadingConfig
from vlmtune.models.quantize import quantized_layers
from vlmtune.runs.resolve import open_model, resolve
from vlmtune.verbs.merge import merge
from vlmtune.verbs.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["qlora", "dora"])
def test_train_reload_merge(method, precision, make_recipe: MakeRecipe, tmp_path):
    recipe = make_recipe(
        tuning={
            "method": method,
            "rank": 4,
            "targets": "all-linear",
            "train": ["vision", "projector", "language"],
        },
        model__quantization="nf4",
        model__device="cuda",
        training__precision=precision,
        training__max_steps=3,
    )
    train(recipe, run_dir=tmp_path / "run")
    opened = open_model(resolve(tmp_path / "run"), LoadingConfig(device="cuda"))
    assert len(quantized_layers(opened.model, "nf4")) == 14
    result = merge(tmp_path / "run", tmp_path / "model", dtype="fp32", device="cuda")
    assert all(result["changed"].values())
    assert result["max_logit_difference"] < 1e-3


def test_int8_answers(lora_run):
    opened = open_model(resolve(lora_run), LoadingConfig(device="cuda", quantization="int8"))
    assert len(quantized_layers(opened.model, "int8")) == 14
    with torch.no_grad():
        logits = opened.model(input_ids=torch.arange(20, device="cuda")[None]).logits
    assert torch.isfinite(logits).all()
