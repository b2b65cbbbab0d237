"""What trains: adapters in the language model alone, or the parts that were asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from tiny_world import copied
from vlmtune.errors import ModelError
from vlmtune.models.families import load_family
from vlmtune.models.load import load_model
from vlmtune.tuning.apply import adapter_keys, apply_tuning, load_adapter
from vlmtune.tuning.config import PARTS, TuningConfig
from vlmtune.tuning.parts import count_parts, part_of
from vlmtune.verbs.train import train

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_base):
    return load_model(tiny_base, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def facts(tiny_base):
    return load_family(str(tiny_base)).facts


def test_adapters_sit_in_the_language_model(model, facts):
    tuned = apply_tuning(model, TuningConfig(rank=2), facts, base_id="owner/base")
    assert (
        count_parts(model, facts, trainable=True).items() >= {"vision": 0, "projector": 0}.items()
    )
    names = tuned.trainable()
    assert names
    assert all("lora_" in name and part_of(name, facts) == "language" for name in names)
    assert len(names) == 2 * 7 * 2  # layers x names x (A and B)
    assert all(parameter.dtype == torch.float32 for parameter in names.values())
    assert tuned.adapter.peft_config["default"].base_model_name_or_path == "owner/base"


def test_adapters_are_fp32_over_a_bf16_base(tiny_base, facts):
    model = load_model(tiny_base, dtype=torch.bfloat16, device=CPU)
    tuned = apply_tuning(model, TuningConfig(rank=2), facts, base_id="b")
    assert {parameter.dtype for parameter in tuned.trainable().values()} == {torch.float32}
    frozen = {p.dtype for n, p in model.named_parameters() if n not in tuned.trainable()}
    assert frozen == {torch.bfloat16}


def test_a_fresh_adapter_changes_nothing(tiny_base, facts):
    """Its product starts at zero; a random one would not."""
    plain = load_model(tiny_base, dtype=torch.float32, device=CPU)
    model = load_model(tiny_base, dtype=torch.float32, device=CPU)
    tuned = apply_tuning(model, TuningConfig(rank=2, dropout=0), facts, base_id="b")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
        for name, parameter in tuned.trainable().items():
            if "lora_B" in name:
                parameter.fill_(0.1)
        assert not torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)


# Loading an adapter


@pytest.fixture
def adapter(lora_run: Path, tmp_path: Path) -> Path:
    return copied(lora_run / "checkpoints/step-000006", tmp_path / "adapter")


def rewrite(adapter: Path, change) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(weights), path, metadata={"format": "pt"})


def test_an_adapter_loads_every_tensor(adapter, model):
    tuned = load_adapter(model, adapter, trainable=True)
    assert len(tuned.trainable()) == len(adapter_keys(adapter)) == 28
    stored = load_file(adapter / "adapter_model.safetensors")
    for name, parameter in tuned.trainable().items():
        key = f"base_model.model.{name.replace('.default', '')}"
        assert torch.equal(parameter, stored[key])


def test_a_frozen_one_does_not_train(adapter, model):
    tuned = load_adapter(model, adapter, trainable=False)
    assert tuned.trainable() == {}


def test_keys_that_match_nothing_are_refused(adapter, model):
    rewrite(
        adapter,
        lambda found: {name.replace("layers.1.", "layers.7."): t for name, t in found.items()},
    )
    with pytest.raises(ModelError, match="14 of its tensors match nothing") as caught:
        load_adapter(model, adapter, trainable=False)
    assert "14 places stay empty" in str(caught.value)


def test_one_missing_tensor_is_refused(adapter, model):
    rewrite(adapter, lambda found: dict(sorted(found.items())[1:]))
    with pytest.raises(ModelError, match="1 places stay empty"):
        load_adapter(model, adapter, trainable=False)


def test_a_tensor_of_another_shape_is_refused(adapter, model):
    rewrite(
        adapter,
        lambda found: {name: tensor[..., :-1].contiguous() for name, tensor in found.items()},
    )
    with pytest.raises(ModelError, match="adapter"):
        load_adapter(model, adapter, trainable=False)


def test_an_unreadable_adapter_is_one_sentence(adapter, model):
    (adapter / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be read as an adapter"):
        load_adapter(model, adapter, trainable=False)


def test_the_adapters_own_configuration_names_the_base(adapter, tiny_base):
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tiny_base)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)


# Full fine-tuning


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({}, PARTS),
        ({"freeze": ("vision",)}, ("projector", "language")),
        ({"train": ("projector",)}, ("projector",)),
        ({"train": ("vision", "language"), "freeze": ("language",)}, ("vision",)),
    ],
)
def test_full_trains_the_parts_asked_for(config, parts, model, facts):
    tuned = apply_tuning(model, TuningConfig(method="full", **config), facts, base_id="b")
    assert tuned.adapter is None
    assert {part_of(name, facts) for name in tuned.trainable()} == set(parts)
    whole, trained = (count_parts(model, facts, trainable=only) for only in (False, True))
    assert trained == {part: whole[part] if part in parts else 0 for part in PARTS}


def test_nothing_to_train_is_refused():
    with pytest.raises(ValidationError, match="leaves nothing to train"):
        TuningConfig(method="full", freeze=PARTS)


def test_a_parameter_of_no_part_is_refused(facts):
    with pytest.raises(ModelError, match=r"audio_tower\.weight.*belongs to no part"):
        part_of("audio_tower.weight", facts)


def test_frozen_parts_keep_their_bits(make_recipe, tiny_base, tmp_path):
    tuning = {"method": "full", "freeze": ["vision", "language"]}
    recipe = make_recipe(tuning=tuning, training__max_steps=2, training__weight_decay=0.1)
    train(recipe, run_dir=tmp_path / "run")
    before = load_file(tiny_base / "model.safetensors")
    after = load_file(tmp_path / "run/checkpoints/step-000002/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".merger." in name for name in changed)
    contract = (tmp_path / "run/checkpoints/step-000002/contract.json").read_text("utf-8")
    assert json.loads(contract)["trained"] == ["projector"]
    shutil.rmtree(tmp_path / "run")


def test_the_parts_of_every_parameter_are_known(model, facts):
    counts = count_parts(model, facts, trainable=False)
    assert all(counts.values())
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert isinstance(model, nn.Module)
