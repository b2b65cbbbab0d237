"""What is held in few bits, what is not, and that a loader that chooses otherwise is noticed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from tiny_rows import changed
from vlmtune.errors import MissingExtraError, ModelError, UsageError
from vlmtune.models import load as load_module
from vlmtune.models import quantize
from vlmtune.models.families import load_family
from vlmtune.models.load import LoadingConfig, load_model
from vlmtune.models.products import Linear
from vlmtune.models.quantize import (
    Quantization,
    dequantize,
    finish_quantized,
    numel,
    plan_quantization,
    quantized_layers,
)

CPU = torch.device("cpu")
IDS = torch.arange(20)[None]


@pytest.fixture(scope="module")
def facts(tiny_base):
    return load_family(str(tiny_base)).facts


@pytest.fixture(scope="module")
def nf4(tiny_base, facts):
    return plan_quantization(tiny_base, facts, "nf4")


def loaded(folder, quantization, dtype=torch.float32, **options):
    return load_model(folder, dtype=dtype, device=CPU, quantization=quantization, **options)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


def test_tower_projector_and_head_keep_their_weights(nf4, tiny_base):
    assert nf4 == Quantization(method="nf4", kept=("model.visual", "lm_head"))
    model = loaded(tiny_base, nf4)
    layers = quantized_layers(model, "nf4")
    assert len(layers) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in layers)
    plain = [name for name, m in model.named_modules() if type(m) in (nn.Linear, Linear)]
    assert {name.split(".")[1] if "." in name else name for name in plain} == {"visual", "lm_head"}
    state = next(iter(layers.values())).weight.quant_state
    assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)


def test_the_names_of_the_tutorials_are_caught(tiny_base, nf4):
    """Negative control: 'visual' skips nothing, and un-skips the head; nobody would notice."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    quantize.import_bitsandbytes()
    careless = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["visual"]
    )
    model = AutoModelForImageTextToText.from_pretrained(
        tiny_base, quantization_config=careless, device_map="cpu"
    )
    assert "lm_head" in quantized_layers(model, "nf4")
    with pytest.raises(ModelError, match="25 layers are quantised, among them 11 that should"):
        finish_quantized(model, nf4, torch.float32, torch.float32)
    # And one that should be quantised and is not.
    everything = Quantization(method="nf4", kept=("model.visual",))
    with pytest.raises(ModelError, match=r"1 that should be quantised are not \(first: \['lm_h"):
        finish_quantized(loaded(tiny_base, nf4), everything, torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rest_is_held_in_the_format_asked_for(dtype, tiny_base, nf4):
    model = loaded(tiny_base, nf4, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype, torch.uint8}
    layer = next(iter(quantized_layers(model, "nf4").values()))
    assert layer.compute_dtype == layer.bias.dtype == layer.weight.quant_state.dtype == dtype
    assert torch.isfinite(logits(model)).all()
    # Read in the folder's own format: the 4 bits do not depend on the format of the rest.
    same = next(iter(quantized_layers(loaded(tiny_base, nf4), "nf4").values()))
    assert torch.equal(layer.weight, same.weight)


def test_dequantised_says_the_same(tiny_base, nf4):
    model = loaded(tiny_base, nf4)
    expected = logits(model)
    dequantize(model)
    assert quantized_layers(model, "nf4") == {}
    assert "quantization_config" not in model.config.to_dict()
    assert float((expected - logits(model)).abs().max()) < 1e-6
    plain = load_model(tiny_base, dtype=torch.float32, device=CPU)
    assert float((expected - logits(plain)).abs().max()) > 1e-3


def test_asking_does_not_change_the_weights(tiny_base, nf4):
    """bitsandbytes packs them anew on some CPUs, for products in bf16 only."""
    model = loaded(tiny_base, nf4)
    layer = next(iter(quantized_layers(model, "nf4").values()))
    before = layer.weight.clone()
    logits(model)
    assert torch.equal(before, layer.weight)
    assert layer.weight.quant_state.nested
    assert layer.support_avx512bf16_for_cpu is False


def test_int8(tiny_base, facts):
    int8 = plan_quantization(tiny_base, facts, "int8")
    model = loaded(tiny_base, int8)
    assert len(quantized_layers(model, "int8")) == 14
    plain = logits(load_model(tiny_base, dtype=torch.float32, device=CPU))
    difference = float((logits(model) - plain).abs().max())
    assert 0 < difference < 0.05 * float(plain.abs().max())


def test_weights_are_counted_not_bytes(tiny_base, nf4):
    whole = sum(map(numel, load_model(tiny_base, dtype=torch.float32, device=CPU).parameters()))
    model = loaded(tiny_base, nf4)
    assert sum(map(numel, model.parameters())) == whole
    assert sum(p.numel() for p in model.parameters()) < whole


def test_what_is_quantised_already_is_refused(tiny_base, facts, tmp_path):
    config = json.loads((tiny_base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    folder = changed(tiny_base, tmp_path / "base", config_json=json.dumps(config))
    with pytest.raises(ModelError, match="quantised already, they cannot be quantised to nf4"):
        plan_quantization(folder, facts, "nf4")


def test_without_bitsandbytes_it_says_how_to_install_it(tiny_base, nf4, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'vlmtune\[quant\]'"):
        loaded(tiny_base, nf4)


def test_device_map(tiny_base, monkeypatch):
    asked = []
    load = load_module._from_pretrained
    monkeypatch.setattr(
        load_module,
        "_from_pretrained",
        lambda folder, options: (asked.append(options["device_map"]), load(folder, options))[1],
    )
    model = load_model(tiny_base, dtype=torch.float32, device=CPU, device_map="auto")
    assert asked == ["auto"]
    assert model.device.type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int4"}, "quantization: found 'int4', expected one of nf4, int8, none"),
        ({"device_map": "balanced"}, "device_map: found 'balanced', expected auto"),
        ({"device_map": "auto", "device": "cpu"}, "device_map: auto spreads"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(UsageError, match=message):
        LoadingConfig(**options).resolve()


UNSEEN = """
import sys
from pathlib import Path
import torch
from vlmtune.models.families import load_family
from vlmtune.models.load import load_model
from vlmtune.tuning.apply import apply_tuning
from vlmtune.tuning.config import TuningConfig
base = Path(sys.argv[1])
model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
tuned = apply_tuning(model, TuningConfig(method="dora"), load_family(str(base)).facts, base_id="b")
model(input_ids=torch.arange(9)[None]).logits.sum().backward()
tuned.adapter.merge_and_unload()
print("bitsandbytes" in sys.modules)
"""


@pytest.mark.slow
def test_it_is_not_imported_where_nothing_is_quantised(tiny_base):
    done = subprocess.run(
        [sys.executable, "-c", UNSEEN, str(tiny_base)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
    assert "gemm_4bit" not in done.stderr
    # Negative control: peft itself does import it.
    code = UNSEEN.replace("import sys\n", "import sys\nimport peft\n", 1)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_base)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
