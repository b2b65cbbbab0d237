"""Weights packed by GPTQ, against matrices that are packed here, value by value."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gptq_pack import LAYERS, packed_copy, packed_layer, rounded
from tiny_rows import asked, encoder_of, picture
from vlmtune.batching.collate import pack
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import ModelError
from vlmtune.models import gptq_kernels
from vlmtune.models.classes import know_classes_of
from vlmtune.models.families import family_class
from vlmtune.models.folder import load_config
from vlmtune.models.gptq import (
    GptqLinear,
    Packing,
    check_packed_layers,
    find_packing,
    is_gptq,
    packed_sizes,
    put_packed_layers,
)
from vlmtune.models.load import load_model
from vlmtune.models.quantize import plan_quantization
from vlmtune.testing import tiny
from vlmtune.training.loss import summed_loss
from vlmtune.tuning.apply import apply_tuning
from vlmtune.tuning.config import TuningConfig
from vlmtune.tuning.parts import count_parts

INPUTS, OUTPUTS = 48, 16
REAL_BYTES = 9_731_786_240  # of model.safetensors.index.json


def random_parts(group_size, *, shuffled=False, seed=0):
    """Values, zeros, scales and groups of every kind that the format can hold."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(INPUTS) // group_size
    if shuffled:
        groups = groups[torch.randperm(INPUTS, generator=generator)]
    count = int(groups.max()) + 1
    return (
        torch.randint(0, 16, (INPUTS, OUTPUTS), generator=generator),
        torch.randint(1, 17, (count, OUTPUTS), generator=generator),
        torch.rand(count, OUTPUTS, generator=generator).half().float() + 0.5,
        groups,
    )


def layer_of(values, zeros, scales, groups, bias=None):
    layer = GptqLinear(
        INPUTS, OUTPUTS, len(scales), bias=bias is not None, device=torch.device("cpu")
    )
    tensors = packed_layer(values, zeros, scales, groups, bias)
    layer.load_state_dict({name: tensors[name] for name in layer.state_dict()})
    return layer


def meant(values, zeros, scales, groups):
    """The weights, value by value, in float16 as the format has them: ``(inputs, outputs)``."""
    weight = torch.zeros(INPUTS, OUTPUTS, dtype=torch.float16)
    for row in range(INPUTS):
        for column in range(OUTPUTS):
            group = groups[row]
            level = float(values[row, column] - zeros[group, column])
            weight[row, column] = level * float(scales[group, column].half())
    return weight


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("group_size", [8, 16, 20, INPUTS, 7])
def test_unpacked_is_what_was_packed(group_size, shuffled):
    parts = random_parts(group_size, shuffled=shuffled)
    layer, expected = layer_of(*parts), meant(*parts)
    assert torch.equal(layer.unpacked(), expected)
    assert torch.equal(layer.weight, expected.t())
    assert layer.weight.dtype == torch.float16
    # Negative controls: the groups count, and the one that the format takes off every zero.
    if group_size < INPUTS:
        layer.g_idx = layer.g_idx.flip(0)
        assert not torch.equal(layer.unpacked(), expected)
    values, zeros, scales, groups = parts
    assert not torch.equal(layer_of(values, zeros % 16 + 1, scales, groups).unpacked(), expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_and_its_gradient_are_a_plain_layer_s(kind):
    parts = random_parts(16, shuffled=True)
    bias = torch.linspace(-1, 1, OUTPUTS)
    packed = layer_of(*parts, bias=bias)
    plain = nn.Linear(INPUTS, OUTPUTS, dtype=kind)
    plain.load_state_dict({"weight": packed.weight, "bias": bias.half()})
    found, expected = (torch.randn(2, 3, INPUTS).to(kind).requires_grad_() for _ in range(2))
    expected.data = found.data.clone()
    outputs = [packed(found), plain(expected)]
    assert outputs[0].dtype == kind
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
    assert found.grad.abs().sum() > 0
    assert not list(packed.parameters())  # nothing of it trains


def test_nothing_unpacked_is_kept_for_the_backward_pass():
    """Else a step would hold the whole model in 16 bits."""
    layer = layer_of(*random_parts(16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        layer(torch.randn(4, INPUTS, requires_grad=True))
        assert not kept
        nn.Linear(INPUTS, OUTPUTS)(torch.randn(4, INPUTS, requires_grad=True))
    assert kept  # the control


def test_in_autocast_as_a_plain_layer():
    packed = layer_of(*random_parts(16), bias=torch.ones(OUTPUTS))
    states = torch.randn(4, INPUTS, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = packed(states)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert states.grad.dtype == torch.float32


# Folders


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny("qwen_vl", tmp_path_factory.mktemp("gptq") / "plain", seed=2)


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    return packed_copy(plain, tmp_path_factory.mktemp("gptq") / "int4", desc_act=True)


def opened(folder, dtype=torch.float32):
    return load_model(folder, dtype=dtype, device=torch.device("cpu"))


def changed(folder, to, **settings):
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= settings
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return to


@pytest.mark.slow  # seconds of making modules
def test_the_real_folder_s_names_and_bytes(shared_data):
    """On the meta device: every tensor of the published Int4 model, and its size to the byte."""
    real = shared_data / "model_meta" / "qwen_vl_chat"
    know_classes_of("qwen")
    from transformers import AutoModelForImageTextToText

    packing = find_packing(real)
    assert packing is not None
    assert (packing.group_size, len(packing.layers)) == (128, 32 * len(LAYERS))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(load_config(str(real))).half()
    put_packed_layers(model, packing)
    index = json.loads((real / "model.safetensors.index.json").read_text(encoding="utf-8"))
    state = model.state_dict()
    assert state.keys() == index["weight_map"].keys()
    assert sum(tensor.nbytes for tensor in state.values()) == REAL_BYTES
    facts = family_class("qwen").facts
    counts = count_parts(model, facts, trainable=False)
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("c_attn.bias"))
    assert sum(counts.values()) + biases == 9_656_935_168


def test_a_packed_folder_is_the_model_with_its_rounded_weights(plain, folder):
    packed, reference = opened(folder), opened(plain)
    assert set(packed_sizes(packed)) == {
        f"transformer.h.{block}.{layer}.weight" for block in range(2) for layer in LAYERS
    }
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name in packed_sizes(packed):
                values, zeros, scales, groups = rounded(parameter, 32, act_order=True)
                parameter.copy_(((values - zeros[groups]) * scales.half()[groups]).t())
            parameter.copy_(parameter.half())
    encoder = encoder_of(folder, ImagePolicy())
    batch = pack(encoder.family, [encoder.encode(asked("?", "yes", picture((50, 40))))])
    with torch.no_grad():
        losses = [float(summed_loss(m, encoder.family, batch)) for m in (packed, reference)]
        before = float(summed_loss(opened(plain), encoder.family, batch))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0] - before) > 1e-3  # the control: rounding is seen


def test_the_scales_keep_their_format(folder):
    model = opened(folder, torch.bfloat16)
    layer = model.transformer.h[0].attn.c_attn
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (layer.scales.dtype, layer.qweight.dtype) == (torch.float16, torch.int32)


def test_adapters_train_over_it_and_cannot_be_merged(folder):
    model, encoder = opened(folder), encoder_of(folder, ImagePolicy())
    facts = encoder.family.facts
    whole = count_parts(model, facts, trainable=False)
    assert whole == count_parts(opened(folder), facts, trainable=False)
    tuned = apply_tuning(model, TuningConfig(rank=4, dropout=0), facts, base_id="int4")
    batch = pack(encoder.family, [encoder.encode(asked("?", "yes", picture((50, 40))))])
    model.train()
    losses = []
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2)
    for _ in range(4):
        loss = summed_loss(model, encoder.family, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert count_parts(model, facts, trainable=True)["vision"] == 0
    with pytest.raises(ValueError, match="gptq"):  # peft itself must not lose them silently
        tuned.adapter.merge_and_unload()


@pytest.mark.parametrize("method", ["dora", "rslora"])
def test_other_adapters_begin_unchanged(folder, method):
    encoder = encoder_of(folder, ImagePolicy())
    batch = pack(encoder.family, [encoder.encode(asked("?", "yes"))])
    model = opened(folder)
    with torch.no_grad():
        before = float(summed_loss(model, encoder.family, batch))
        apply_tuning(
            model, TuningConfig(method=method, rank=4), encoder.family.facts, base_id="int4"
        )
        assert float(summed_loss(model, encoder.family, batch)) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "bits=8; expected 4"),
        ({"checkpoint_format": "gptq_v2"}, "checkpoint_format='gptq_v2'; expected 'gptq'"),
        ({"group_size": 0}, "group_size: found 0"),
        ({"group_size": None}, "group_size: found None"),
        ({"group_size": 16}, "cannot be loaded|mismatched keys"),  # other shapes than are there
    ],
)
def test_another_packing_is_refused(folder, tmp_path, settings, message):
    with pytest.raises(ModelError, match=message):
        opened(changed(folder, tmp_path / "other", **settings))


def test_a_folder_of_another_model_is_refused(folder, tmp_path):
    copy = changed(folder, tmp_path / "other")
    tensors = load_file(copy / "model.safetensors")
    missing = {name: value for name, value in tensors.items() if not name.endswith("w1.scales")}
    save_file(missing, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="missing keys in its weights"):
        opened(copy)
    stranger = {**tensors, "transformer.h.0.mlp.w9.qweight": torch.zeros(1)}
    save_file(stranger, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"packs a layer 'transformer.h.0.mlp.w9'"):
        opened(copy)
    groups = {**tensors}
    groups["transformer.h.1.mlp.w2.g_idx"] = tensors["transformer.h.1.mlp.w2.g_idx"] + 1
    save_file(groups, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"w2.g_idx names the groups 1 to 2; expected 0 to 1"):
        opened(copy)


def test_a_layer_of_odd_width_is_refused():
    model = nn.ModuleDict({"odd": nn.Linear(12, 16)})
    with pytest.raises(ModelError, match="odd has 12 inputs and 16 outputs"):
        put_packed_layers(model, Packing(4, {"odd": False}))
    check_packed_layers("folder", model)  # type: ignore[arg-type]  # nothing to look at


def test_it_is_quantised_once(folder, plain):
    facts = family_class("qwen").facts
    with pytest.raises(ModelError, match="quantised already, they cannot be quantised to nf4"):
        plan_quantization(folder, facts, "nf4")
    assert (is_gptq(folder), is_gptq(plain)) == (True, False)
    assert find_packing(plain) is None


@pytest.fixture
def _compiled_anew():
    gptq_kernels._compiled.cache_clear()
    yield
    gptq_kernels._compiled.cache_clear()


@pytest.mark.skipif(not gptq_kernels.has_compiler("cpu"), reason="there is no C++ compiler")
@pytest.mark.slow
@pytest.mark.usefixtures("_compiled_anew")
def test_the_compiled_kernel_gives_the_same_bits(caplog):
    """Forward and backward over groups in no order; shapes that it was not compiled for."""
    states = torch.randn(5, INPUTS)
    for group_size in (8, 20, INPUTS):
        layer = layer_of(*random_parts(group_size, shuffled=True))
        plain, gradients = layer.weight, []
        for weights in (0, gptq_kernels.LEAST_WEIGHTS):
            layer.weights_in_all = weights
            assert torch.equal(layer.weight, plain)
            own = states.clone().requires_grad_()
            layer(own).square().sum().backward()
            gradients.append(own.grad)
        assert torch.equal(*gradients)
    chosen = gptq_kernels.unpacker(torch.device("cpu"), gptq_kernels.LEAST_WEIGHTS)
    assert chosen is not gptq_kernels.unpack_plain
    assert "could not be used" not in caplog.text


@pytest.mark.parametrize("fault", ["wrong", "broken"])
@pytest.mark.usefixtures("_compiled_anew")
def test_a_kernel_that_is_not_right_is_not_used(fault, monkeypatch, caplog):
    def kernel(*parts):
        if fault == "broken":
            raise RuntimeError("no such instruction\nand more")
        return gptq_kernels.unpack_plain(*parts).nextafter(torch.tensor(torch.inf).half())

    monkeypatch.setattr(torch, "compile", lambda _, **__: kernel)
    monkeypatch.setattr(gptq_kernels, "has_compiler", lambda _: True)
    chosen = gptq_kernels.unpacker(torch.device("cpu"), gptq_kernels.LEAST_WEIGHTS)
    assert chosen is gptq_kernels.unpack_plain
    assert ("other weights" if fault == "wrong" else "no such instruction)") in caplog.text


def test_small_models_are_not_compiled_for():
    assert gptq_kernels.unpacker(torch.device("cpu"), 1000) is gptq_kernels.unpack_plain
