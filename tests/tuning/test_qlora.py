"""QLoRA on the CPU, for real: trained over 4 bits, stopped, resumed, reloaded, asked, merged.

One recipe has it all: adapters in all three parts, a module that trains in full (the tied
embedding), learning rates by part.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny_world import MakeRecipe, fingerprint, lines
from vlmtune.errors import MergeError, UsageError
from vlmtune.models.contract import Contract
from vlmtune.models.load import LoadingConfig
from vlmtune.models.quantize import quantized_layers
from vlmtune.runs.resolve import OpenModel, open_model, resolve
from vlmtune.training.loop import StoppedError
from vlmtune.verbs import merge as merge_module
from vlmtune.verbs import train as train_module
from vlmtune.verbs.merge import merge
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.predict import predict
from vlmtune.verbs.train import train

CPU = LoadingConfig(device="cpu")
TUNING: dict[str, Any] = {
    "method": "qlora",
    "rank": 4,
    "alpha": 8,
    "dropout": 0.1,
    "init": "gaussian",
    "targets": "all-linear",
    "train": ["vision", "projector", "language"],
    "modules_to_save": ["embed_tokens"],
    "learning_rates": {"vision": 2e-3, "projector": 4e-3},
}


class Stop(Observer):
    """Stops the run after its second step, between two checkpoints."""

    def step(self, report):
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def recipe(make_recipe: MakeRecipe, base: Path, **changes: Any) -> Any:
    return make_recipe(
        model__base=str(base),
        tuning=TUNING,
        **{"training__max_steps": 3, "training__save_steps": 3, **changes},
    )


@pytest.fixture(scope="module")
def trained(lively_base, make_recipe, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A finished run, and the model as it stood in memory at its end."""
    folder, kept = tmp_path_factory.mktemp("qlora") / "run", {}
    with pytest.MonkeyPatch.context() as patch:
        run = train_module.run
        patch.setattr(train_module, "run", lambda job: (kept.update(vars(job)), run(job))[1])
        train(recipe(make_recipe, lively_base), run_dir=folder)
    return folder, kept


def opened(path: Path, **options: Any) -> OpenModel:
    return open_model(resolve(path), LoadingConfig(device="cpu", **options))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def test_what_trains_and_over_what(trained):
    run, job = trained
    layers = quantized_layers(job["model"], "nf4")
    assert len(layers) == 14
    assert all(name.startswith("model.language_model.layers.") for name in layers)
    assert {p.dtype for p in job["strategy"].parameters.values()} == {torch.float32}
    contract = Contract.read(run / "checkpoints/step-000003")
    assert contract.quantization is not None
    assert contract.quantization.method == "nf4"
    assert contract.trained == ("vision", "projector", "language")
    highest = {group["highest_lr"] for group in job["strategy"].optimizer.param_groups}
    assert highest == {2e-3, 4e-3, 1e-2}


def test_reloaded_in_4_bits_it_says_what_it_said_at_the_end_of_training(trained, logits_on):
    run, job = trained
    again = opened(run)
    assert len(quantized_layers(again.model, "nf4")) == 14
    expected = logits_on(job["model"], again.encoder)
    assert torch.equal(logits_on(again.model, again.encoder), expected)
    # Negative controls: other bits under the same adapter are another model.
    for kind in ("none", "int8"):
        other = opened(run, quantization=kind)
        assert len(quantized_layers(other.model, "nf4")) == 0
        assert distance(expected, logits_on(other.model, other.encoder)) > 1e-3


def test_another_base_than_trained_is_said(trained, caplog):
    run, _ = trained
    opened(run)
    assert caplog.text == ""
    found = opened(run, quantization="none")
    assert "trained over a base held in nf4 and is opened over its own weights" in caplog.text
    assert found.contract.quantization is None


def test_stopped_and_resumed_is_uninterrupted(trained, lively_base, make_recipe, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(StoppedError):
        train(recipe(make_recipe, lively_base), run_dir=run, observer=Stop())
    train(recipe(make_recipe, lively_base), run_dir=run, resume=True)
    assert fingerprint(run) == fingerprint(trained[0])


def test_predict_takes_the_bits_from_the_contract(trained, tmp_path):
    from PIL import Image

    picture = tmp_path / "p.png"
    Image.new("RGB", (64, 48), "white").save(picture)
    first = predict(trained[0], [picture], max_new_tokens=6, loading=CPU)
    asked = LoadingConfig(device="cpu", quantization="nf4")
    assert predict(trained[0], [picture], max_new_tokens=6, loading=asked)["text"] == first["text"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision(precision, lively_base, make_recipe, tmp_path, logits_on):
    changes = {"training__precision": precision, "training__max_steps": 2}
    train(recipe(make_recipe, lively_base, **changes), run_dir=tmp_path / "run")
    assert [step["applied"] for step in lines(tmp_path / "run/metrics.jsonl")] == [True, True]
    weights = load_file(tmp_path / "run/checkpoints/step-000002/adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    half = opened(tmp_path / "run", dtype=precision)
    whole = opened(tmp_path / "run", dtype="fp32")
    expected = logits_on(whole.model, whole.encoder)
    assert 0 < distance(expected, logits_on(half.model, half.encoder)) < 0.05


# Merging


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("merged") / "model"
    return out, merge(trained[0], out, device="cpu")


def test_merged_weights_are_plain(merged, trained, logits_on, monkeypatch):
    out, result = merged
    assert result["onto"] == "dequantised"
    # Both names of the tied embedding, seven projections of two layers, and what the tower has.
    assert result["changed"] == {"vision": 8, "projector": 2, "language": 16}
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in json.dumps(config)
    assert config["tie_word_embeddings"] is True
    assert Contract.read(out).quantization is None
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # nobody needs it for the merged model
    from transformers import AutoModelForImageTextToText

    plain = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    again = opened(out)
    found = logits_on(plain, again.encoder)
    torch.testing.assert_close(found, logits_on(again.model, again.encoder), rtol=0, atol=1e-5)
    assert distance(logits_on(trained[1]["model"], again.encoder), found) < 0.05


@pytest.mark.slow
def test_onto_the_original_the_difference_is_measured(merged, trained, tmp_path):
    exact = merge(trained[0], tmp_path / "exact", dtype="fp32", device="cpu")
    original = merge(trained[0], tmp_path / "original", dtype="fp32", onto="original", device="cpu")
    assert original["onto"] == "original"
    assert exact["max_logit_difference"] < 1e-3 < original["max_logit_difference"]
    assert original["changed"] == exact["changed"] == merged[1]["changed"]


@pytest.mark.slow
def test_a_base_dequantised_wrongly_is_found(trained, tmp_path, monkeypatch):
    dequantize = merge_module.dequantize

    def wrongly(model):
        dequantize(model)
        with torch.no_grad():
            model.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.01)

    monkeypatch.setattr(merge_module, "dequantize", wrongly)
    with pytest.raises(MergeError, match="dequantising the base changed the model"):
        merge(trained[0], tmp_path / "model", device="cpu")
    assert not (tmp_path / "model").exists()


def test_onto_is_for_quantised_bases(trained, lora_run, tmp_path):
    with pytest.raises(UsageError, match=r"--onto: .* was not trained over a quantised base"):
        merge(lora_run, tmp_path / "model", onto="original")
    with pytest.raises(UsageError, match="--onto: found 'base', expected one of dequantised"):
        merge(trained[0], tmp_path / "model", onto="base")
