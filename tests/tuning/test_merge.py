"""Merging: what comes out is base + adapter, and what is not is not published."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_world import MakeRecipe, copied
from vlmtune.batching.collate import pack
from vlmtune.data.dataset import PreparedDataset
from vlmtune.errors import MergeError, RefusedError, UsageError
from vlmtune.models.contract import Contract
from vlmtune.models.load import LoadingConfig
from vlmtune.runs.resolve import OpenModel, open_model, resolve
from vlmtune.training.loss import label_logits
from vlmtune.verbs import merge as module
from vlmtune.verbs.merge import merge
from vlmtune.verbs.train import train

CPU = LoadingConfig(dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def merged(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "model"
    result = merge(lora_run, out)
    assert result["path"] == str(out)
    assert result["greedy_equal"] is True
    assert result["max_logit_difference"] < 1e-4
    assert result["changed"]["language"] == 14
    assert result["changed"]["vision"] == result["changed"]["projector"] == 0
    return out


def opened(path: Path) -> OpenModel:
    return open_model(resolve(path), CPU)


def logits(model: OpenModel, data: Path) -> torch.Tensor:
    """Of the validation rows' answers, ``(labels, vocabulary)``."""
    rows = PreparedDataset.open(data).split("validation")
    batch = pack(model.encoder.family, [model.encoder.encode(row) for row in rows])
    with torch.no_grad():
        return label_logits(model.model, model.encoder.family, batch)


def corrupt(folder: Path, name: str, row: int = -1) -> None:
    """Change one number of one tensor."""
    (path,) = folder.glob("*.safetensors")
    weights = {key: tensor.clone() for key, tensor in load_file(path).items()}
    weights[name].view(-1)[row] += 0.5
    save_file(weights, path, metadata={"format": "pt"})


def test_merged_is_base_and_adapter(merged, lora_run, tiny_data, tiny_base):
    expected = logits(opened(lora_run), tiny_data)
    found = logits(opened(merged), tiny_data)
    assert float((expected - found).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    # Negative control: the base alone is something else.
    family_row = logits(
        OpenModel(
            resolve(tiny_base),
            opened(tiny_base).model,
            None,
            opened(lora_run).encoder,
        ),
        tiny_data,
    )
    assert float((expected - family_row).abs().max()) > 1e-3


def test_plain_transformers_reads_it(merged, lora_run, tiny_data):
    """Without a line of ours: the same answers, and the trained limits in both processor files."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(merged).eval()
    trained = opened(lora_run)
    plain = OpenModel(trained.resolved, model, None, trained.encoder)
    torch.testing.assert_close(
        logits(plain, tiny_data), logits(trained, tiny_data), rtol=0, atol=1e-4
    )
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.get_vocab() == trained.encoder.family.parts.tokenizer.get_vocab()
    assert tokenizer.chat_template == trained.encoder.family.parts.template
    old = json.loads((merged / "preprocessor_config.json").read_text(encoding="utf-8"))
    new = json.loads((merged / "processor_config.json").read_text(encoding="utf-8"))
    for settings in (old, new["image_processor"]):
        assert settings["max_pixels"] == settings["size"]["longest_edge"] == 6272
        assert settings["min_pixels"] == settings["size"]["shortest_edge"] == 3136
    assert list(merged.glob("adapter*")) == []


def test_the_contract_goes_along(merged, lora_run):
    contract = Contract.read(merged)
    assert contract == Contract.read(lora_run / "checkpoints/step-000006")
    assert contract.trained == ("language",)
    assert opened(merged).contract == opened(lora_run).contract


def test_a_fully_tuned_model_is_merged_as_it_is(full_run, tmp_path, tiny_data):
    result = merge(full_run, tmp_path / "model", dtype="bf16")
    assert all(result["changed"].values())
    weights = load_file(tmp_path / "model/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    stored = load_file(full_run / "checkpoints/step-000006/model.safetensors")
    assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in stored.items())
    expected, found = (logits(opened(p), tiny_data) for p in (full_run, tmp_path / "model"))
    difference = float((expected - found).abs().max())
    assert 0 < difference < 0.1 * float(expected.abs().max())


# What must not be published


def published(out: Path) -> bool:
    return out.exists() or any(entry.name.startswith(".") for entry in out.parent.iterdir())


TENSORS = (
    "model.layers.0.mlp.up_proj.weight",  # as the hubs' files name them
    "visual.blocks.0.attn.qkv.weight",
    "model.embed_tokens.weight",  # of a token that the probe never sees
)
QUICK = {(TENSORS[1], "fp32"), (TENSORS[2], "bf16")}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if (name, dtype) in QUICK else pytest.mark.slow)
        for name in TENSORS
        for dtype in ("fp32", "bf16")
    ],
)
def test_a_tensor_written_wrongly_is_found(name, dtype, lora_run, tmp_path, monkeypatch):
    save = module.save_model

    def save_wrongly(*arguments, **options):
        save(*arguments, **options)
        corrupt(arguments[1], name)

    monkeypatch.setattr(module, "save_model", save_wrongly)
    (tmp_path / "out").mkdir()
    with pytest.raises(MergeError, match=r"[12] tensors were read back otherwise"):
        merge(lora_run, tmp_path / "out/model", dtype=dtype)
    assert not published(tmp_path / "out/model")


def test_a_wrong_merge_in_memory_is_found(lora_run, tmp_path, monkeypatch):
    merge_adapter = module.merge_adapter

    def merge_wrongly(tuned):
        merged = merge_adapter(tuned)
        with torch.no_grad():
            merged.model.language_model.layers[1].mlp.down_proj.weight[0] += 0.1
        return merged

    monkeypatch.setattr(module, "merge_adapter", merge_wrongly)
    (tmp_path / "out").mkdir()
    with pytest.raises(MergeError, match="merging in memory changed the model"):
        merge(lora_run, tmp_path / "out/model")
    assert not published(tmp_path / "out/model")


def test_a_trained_part_that_did_not_change_fails(lora_run, tmp_path):
    adapter = copied(lora_run / "checkpoints/step-000006", tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name, tensor in weights.items():
        if "lora_B" in name:
            tensor.zero_()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(MergeError, match="the language part was trained, but no tensor"):
        merge(adapter, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_tower_that_was_lost_fails(full_run, tiny_base, tmp_path):
    """The peers' defect: what was trained in the tower does not reach the merged model."""
    folder = copied(full_run / "checkpoints/step-000006", tmp_path / "tuned")
    base = load_file(tiny_base / "model.safetensors")
    tuned = load_file(folder / "model.safetensors")
    tower = {name for name in tuned if name.startswith("visual.") and ".merger." not in name}
    kept = {name: (base if name in tower else tuned)[name].clone() for name in tuned}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="the vision part was trained"):
        merge(folder, tmp_path / "model")


def test_what_is_refused_before_anything_is_loaded(lora_run, tiny_base, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(RefusedError, match="is not empty"):
        merge(lora_run, tmp_path / "full")
    with pytest.raises(UsageError, match="plain model: there is nothing to merge"):
        merge(tiny_base, tmp_path / "model")
    with pytest.raises(UsageError, match="--dtype: found 'int4'"):
        merge(lora_run, tmp_path / "model", dtype="int4")
    assert not (tmp_path / "model").exists()


# An output layer that shares its weights with the embedding


def test_a_tied_head_is_untied(make_recipe: MakeRecipe, tiny_base, tmp_path, tiny_data):
    recipe = make_recipe(tuning__targets=["q_proj", "lm_head"], training__max_steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tie_word_embeddings.*", UserWarning)  # what we test
        train(recipe, run_dir=tmp_path / "run")
        result = merge(tmp_path / "run", tmp_path / "model")
        expected = logits(opened(tmp_path / "run"), tiny_data)
    assert result["changed"] == {"vision": 0, "projector": 0, "language": 3}
    base, weights = (load_file(f / "model.safetensors") for f in (tiny_base, tmp_path / "model"))
    embedding = "model.embed_tokens.weight"
    assert "lm_head.weight" not in base  # tied
    assert torch.equal(base[embedding], weights[embedding])
    assert not torch.equal(weights["lm_head.weight"], weights[embedding])
    config = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False
    from transformers import AutoModelForImageTextToText

    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    trained = opened(tmp_path / "model")
    found = logits(OpenModel(trained.resolved, plain, None, trained.encoder), tiny_data)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
