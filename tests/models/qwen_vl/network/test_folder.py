"""Folders of Qwen-VL: found, read, written, in the original's names and without its code."""

from __future__ import annotations

import json
import re
import runpy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from qwen_vl_network import batch, difference, image, pixels, text
from vlmtune.errors import ModelError
from vlmtune.models.folder import load_config
from vlmtune.models.qwen_vl.configuration import QwenVLConfig, tiny_config
from vlmtune.models.qwen_vl.modeling import QwenVLForConditionalGeneration, QwenVLModel
from vlmtune.models.qwen_vl.register import register

REAL_PARAMETERS = 9_656_935_168
VISUAL, RESAMPLER = 1_935_610_624, 76_054_528
TRAINED_WITH_THE_VIT_FROZEN = 7_797_379_072
QUANTISED = re.compile(r"\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.(w1|w2|c_proj))\.")
ORIGINAL_CODE = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
}


@pytest.fixture
def folder(tiny, tmp_path):
    """The tiny network, saved, with the original's pointer to code that would leave a trace."""
    register()
    tiny.save_pretrained(tmp_path / "model")
    change(tmp_path / "model", auto_map=ORIGINAL_CODE, architectures=["QWenLMHeadModel"])
    for name in ("configuration_qwen.py", "modeling_qwen.py"):
        code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        (tmp_path / "model" / name).write_text(code)
    yield tmp_path / "model"
    assert not (tmp_path / "ran").exists(), "code of the folder was run"
    runpy.run_path(str(tmp_path / "model" / "modeling_qwen.py"))
    assert (tmp_path / "ran").exists(), "the trap does not work"


def change(folder, **entries):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **entries}
    kept = {name: value for name, value in config.items() if value is not None}
    path.write_text(json.dumps(kept))


# The real model


def test_the_real_configuration(shared_data):
    register()
    config = AutoConfig.from_pretrained(str(shared_data / "model_meta" / "qwen_vl_chat"))
    assert isinstance(config, QwenVLConfig)
    assert config.to_dict()["model_type"] == "qwen"
    assert (config.image_token_id, config.vision.image_start_id) == (151859, 151857)
    fresh = QwenVLConfig().to_dict()
    own = {"dtype", "architectures", "_name_or_path"}
    read = {name: value for name, value in config.to_dict().items() if name in fresh.keys() - own}
    assert read == {name: value for name, value in fresh.items() if name not in own}


def test_the_real_parameters(shared_data):
    path = shared_data / "model_meta" / "qwen_vl_chat" / "model.safetensors.index.json"
    quantised = set(json.loads(path.read_text())["weight_map"])
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(QwenVLConfig())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert set(model.state_dict()) == set(sizes)
    assert len(sizes) == 853
    assert sum(sizes.values()) == REAL_PARAMETERS
    ours = {name for name in sizes if not QUANTISED.search(name)}
    theirs = {name for name in quantised if not QUANTISED.search(name)}
    assert ours == theirs
    assert len(ours) > 600
    layers = {QUANTISED.search(name)[0] for name in quantised if QUANTISED.search(name)}
    assert {QUANTISED.search(name)[0] for name in set(sizes) - ours} == layers
    parts = ("transformer.visual.", "transformer.visual.attn_pool.")
    counts = [sum(size for name, size in sizes.items() if name.startswith(part)) for part in parts]
    assert counts == [VISUAL, RESAMPLER]
    assert REAL_PARAMETERS - VISUAL + RESAMPLER == TRAINED_WITH_THE_VIT_FROZEN


# Reading


def test_every_auto_class_reads_it_and_runs_nothing(folder, tiny):
    ids = batch([*text(4), *image(), *text(3)])
    with torch.no_grad():
        expected = tiny(ids, pixel_values=pixels(1)).logits
        for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
            for trust in (False, None, True):
                model = auto.from_pretrained(str(folder), trust_remote_code=trust)
                assert type(model) is QwenVLForConditionalGeneration
                assert difference(model.eval()(ids, pixel_values=pixels(1)).logits, expected) == 0
        base = AutoModel.from_pretrained(str(folder)).eval()
        assert type(base) is QwenVLModel
        states = base(ids, pixel_values=pixels(1)).last_hidden_state
        assert difference(model.lm_head(states), expected) == 0
    assert "auto_map" not in model.config.to_dict()


def test_positions_of_the_resampler_stay_frozen(folder, tiny):
    frozen = ["transformer.visual.attn_pool.pos_embed"]
    loaded = QwenVLForConditionalGeneration.from_pretrained(folder)
    for model in (tiny, loaded):
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == frozen
    again, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not again.transformer.visual.attn_pool.pos_embed.requires_grad


def test_a_text_only_qwen_is_refused_by_name(folder):
    change(folder, visual=None)
    with pytest.raises(ModelError, match="text-only Qwen of 2023, not a Qwen-VL"):
        load_config(str(folder))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rotary_pct": 0.5}, "rotary_pct: found 0.5, expected 1.0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: found True"),
        ({"scale_attn_weights": False}, "scale_attn_weights: found False"),
        ({"kv_channels": 16}, "kv_channels: 2 heads of 16"),
        ({"visual": {"output_dim": 32}}, "visual.output_dim: found 32"),
        ({"visual": {"output_dim": 64, "n_queries": 17}}, "visual.n_queries: found 17"),
        ({"visual": {"output_dim": 64, "heads": 5}}, "visual.width: found 1664"),
        ({"visual": {"output_dim": 64, "image_size": 50}}, "visual.image_size: found 50"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_a_configuration_that_nothing_fits_is_refused(folder, wrong, message):
    change(folder, **wrong)
    with pytest.raises(ModelError, match=message):
        load_config(str(folder))


# Writing


def test_saved_is_what_was_read(original, network, tmp_path):
    """Names and bytes of every tensor, and a configuration that the original's readers know."""
    network.save_pretrained(tmp_path)
    meant, found = (load_file(path / "model.safetensors") for path in (original.folder, tmp_path))
    assert found.keys() == meant.keys() == original.facts["state_dict_shapes"].keys()
    for name, tensor in meant.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes(), name
        assert list(tensor.shape) == original.facts["state_dict_shapes"][name]
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (original.folder, tmp_path)
    )
    ours = {"architectures", "auto_map", "torch_dtype", "transformers_version", "visual"}
    for name in before.keys() - ours:
        assert after[name] == before[name], name
    assert before["visual"].items() <= after["visual"].items()
    assert "auto_map" not in after  # the code it points at is not beside it
    shutil.copy(original.folder / "golden.json", tmp_path)
    shutil.copy(original.folder / "a.png", tmp_path)
    again = type(original)(tmp_path).load()
    with torch.no_grad():
        logits = [
            model(batch(original.ids("one")), pixel_values=original.images("a")).logits
            for model in (network, again)
        ]
    assert torch.equal(*logits)


def test_shards(tiny, tmp_path):
    tiny.save_pretrained(tmp_path, max_shard_size="200KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    names = [name for file in files for name in load_file(file)]
    assert sorted(names) == sorted(tiny.state_dict())
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in tiny.state_dict().items()
    )


def test_fresh_positions_are_the_formula(network):
    """What a checkpoint lacks is made as the original made it."""
    register()
    fresh = QwenVLForConditionalGeneration(network.config)
    found = fresh.transformer.visual.attn_pool.pos_embed
    expected = network.transformer.visual.attn_pool.pos_embed
    assert difference(found, expected.detach()) < 1e-6
    transposed = found.detach().unflatten(0, (16, 16)).transpose(0, 1).flatten(0, 1)
    assert difference(transposed, expected.detach()) > 1


def test_fresh_weights_are_ready_to_train():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = QwenVLForConditionalGeneration(tiny_config(vocab_size=96, image_start_id=80))
    for name, value in model.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert name.endswith("bias") or float(value.std()) > 0 or (value == 1).all(), name
    row = batch([*image(), *text(8)])
    loss = model(row, labels=row, pixel_values=pixels(1)).loss
    assert abs(float(loss.detach()) - 4.56) < 0.3  # log 96: it knows nothing yet


def test_what_transformers_asks_of_a_model(tiny):
    assert tiny.get_input_embeddings() is tiny.transformer.wte
    assert tiny.get_output_embeddings() is tiny.lm_head
    assert not tiny.all_tied_weights_keys
    assert set(tiny._no_split_modules) == {"QwenVLBlock", "QwenVLVisionBlock", "QwenVLResampler"}
    kinds = {type(module).__name__ for module in tiny.modules()}
    assert set(tiny._no_split_modules) <= kinds
    assert tiny.base_model is tiny.transformer
    assert tiny.config.get_text_config() is tiny.config
