"""Tiny models: small, quick, the same for the same seed, and laid out as hubs lay them out."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from tiny_rows import asked, encoder_of, picture
from vlmtune.errors import UsageError
from vlmtune.models.families import FAMILIES as KNOWN
from vlmtune.models.load import load_model
from vlmtune.testing import FAMILIES, TinySize, main, tiny

FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("qwen2_vl", tmp_path_factory.mktemp("testing") / "tiny")


def test_every_family_has_one():
    assert set(FAMILIES) == {family.facts.name for family in KNOWN}


def test_it_takes_a_moment(tmp_path, folder):
    """``folder`` has imported what is needed."""
    start = time.perf_counter()
    tiny("qwen2_vl", tmp_path / "model")
    assert time.perf_counter() - start < 2
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000


def test_the_same_seed_gives_the_same_bytes(tmp_path, folder):
    torch.manual_seed(99)  # nobody's own seed plays a part, nor is it touched
    expected = torch.random.get_rng_state()
    again = tiny("qwen2_vl", tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert contents(again) == contents(folder)
    other = contents(tiny("qwen2_vl", tmp_path / "other", seed=1))
    changed = {name for name, digest in contents(folder).items() if other[name] != digest}
    assert changed == {"model.safetensors"}


def test_the_files_are_a_hub_models(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen2_vl"
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]


def test_the_tensors_are_named_as_on_the_hub(folder):
    """``visual.`` and ``model.layers.``, where the classes in memory say ``model.visual.`` …"""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "visual.patch_embed.proj.weight",
        "visual.blocks.0.attn.qkv.weight",
        "visual.merger.ln_q.weight",
        "visual.merger.mlp.2.bias",
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
    } <= names
    assert {name.split(".")[0] for name in names} == {"visual", "model"}  # the head is tied
    assert not any(name.startswith("model.language_model") for name in names)


def test_it_loads_and_runs_through_the_ordinary_path(folder):
    encoder = encoder_of(folder)
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters < 300_000
    assert len(encoder.family.parts.tokenizer) <= model.get_input_embeddings().num_embeddings
    encoded = encoder.encode(asked("?", "x", picture()))
    assert int(encoded.tokens.ids.max()) < model.config.text_config.vocab_size
    for name in ("image_token_id", "video_token_id"):
        token = f"<|{name.split('_')[0]}_pad|>"
        assert vars(model.config)[name] == encoder.control_id(token)


def test_sizes_are_what_was_asked(tmp_path):
    size = TinySize(hidden=32, layers=1, vision_width=16, vision_layers=1, vocabulary=2048)
    model = load_model(
        tiny("qwen2_vl", tmp_path / "m", size=size),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (32, 1, 2048)
    assert (vision.embed_dim, vision.depth) == (16, 1)


def test_mistakes_are_said(tmp_path, folder):
    with pytest.raises(UsageError, match="expected one of qwen2_vl"):
        tiny("gpt2", tmp_path / "model")
    with pytest.raises(UsageError, match="already holds a model"):
        tiny("qwen2_vl", folder)


def test_the_command_writes_the_same(tmp_path, folder, capsys):
    assert main(["tiny", "qwen2_vl", str(tmp_path / "model"), "--seed", "0"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"
    assert contents(tmp_path / "model") == contents(folder)
    assert main(["tiny", "qwen2_vl", str(tmp_path / "model")]) == 2
    assert "already holds a model" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_as_it_is_typed(tmp_path, folder):
    command = [sys.executable, "-m", "vlmtune.testing", "tiny", "qwen2_vl", str(tmp_path / "m")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert contents(tmp_path / "m") == contents(folder)
