"""Each method trains, is saved, loaded and merged; what is lost on the way is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_world import MakeRecipe, copied, fingerprint
from vlmtune.errors import MergeError, ModelError
from vlmtune.models.families import load_family
from vlmtune.models.load import LoadingConfig, load_model
from vlmtune.runs.resolve import OpenModel, open_model, resolve
from vlmtune.tuning.apply import apply_tuning, load_adapter
from vlmtune.tuning.config import PARTS, TuningConfig
from vlmtune.tuning.parts import count_parts, part_of
from vlmtune.verbs import merge as merge_module
from vlmtune.verbs.merge import merge
from vlmtune.verbs.train import train

CPU = torch.device("cpu")
PLAIN = {"rank": 4, "alpha": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def facts(tiny_base):
    return load_family(str(tiny_base)).facts


def base_of(folder: Path) -> Any:
    return load_model(folder, dtype=torch.float32, device=CPU)


def opened(path: Path) -> OpenModel:
    return open_model(resolve(path), LoadingConfig(device="cpu", dtype="fp32"))


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(20)[None]).logits


# Before the first step


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_a_fresh_adapter_changes_nothing(method, init, lively_base, facts):
    plain, model = base_of(lively_base), base_of(lively_base)
    config = TuningConfig(method=method, init=init, rank=4, dropout=0)
    tuned = apply_tuning(model, config, facts, base_id="b")
    assert float((answer(plain) - answer(model)).abs().max()) < 1e-5
    assert all(torch.equal(p, q) for p, q in _shared(plain, model))
    first = {name: p for name, p in tuned.trainable().items() if "lora_A" in name}
    spread = float(torch.cat([p.detach().flatten() for p in first.values()]).std())
    # Kaiming of width 32 and 64; 1 / rank; a tenth of a random basis.
    expected = {"default": 0.09, "gaussian": 0.25, "orthogonal": 0.07}[init]
    assert spread == pytest.approx(expected, rel=0.2)


def _shared(plain: Any, model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    own = dict(model.named_parameters())
    named = [(name.replace(".base_layer", ""), p) for name, p in own.items()]
    return [(p, dict(plain.named_parameters())[name]) for name, p in named if "lora_" not in name]


def test_rslora_scales_by_the_root_of_the_rank(tiny_base, facts):
    def scaling(method: str) -> float:
        config = TuningConfig(method=method, rank=16, alpha=8)
        model = base_of(tiny_base)
        apply_tuning(model, config, facts, base_id="b")
        return float(model.model.language_model.layers[0].mlp.up_proj.scaling["default"])

    assert scaling("lora") == 8 / 16
    assert scaling("rslora") == 8 / 4


def test_parts_train_as_named(tiny_base, facts):
    model = base_of(tiny_base)
    config = TuningConfig(targets="all-linear", train=("vision", "projector"), rank=2)
    tuned = apply_tuning(model, config, facts, base_id="b")
    counts = count_parts(model, facts, trainable=True)
    assert counts["language"] == 0
    expected = {"vision": 0, "projector": 0}
    for name, module in base_of(tiny_base).named_modules():
        if isinstance(module, torch.nn.Linear) and part_of(name, facts) != "language":
            expected[part_of(name, facts)] += 2 * (module.in_features + module.out_features)
    assert {part: counts[part] for part in expected} == expected
    assert {part_of(name, facts) for name in tuned.trainable()} == {"vision", "projector"}


# A run of everything that is not quantised


@pytest.fixture(scope="module")
def run(lively_base, make_recipe: MakeRecipe, tmp_path_factory) -> Path:
    """DoRA in all parts, beside them a norm and the tied embedding in full."""
    folder = tmp_path_factory.mktemp("methods") / "run"
    tuning = {
        **PLAIN,
        "method": "dora",
        "targets": "all-linear",
        "train": list(PARTS),
        "modules_to_save": ["lm_head", "merger.ln_q"],
    }
    train(
        make_recipe(model__base=str(lively_base), tuning=tuning, training__max_steps=2),
        run_dir=folder,
    )
    return folder


def adapter_of(run: Path, to: Path) -> Path:
    return copied(run / "checkpoints/step-000002", to)


def edited(adapter: Path, change: Any) -> Path:
    path = adapter / "adapter_model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(weights), path, metadata={"format": "pt"})
    return adapter


def test_merged_is_base_and_adapter(run, lively_base, tmp_path, logits_on):
    result = merge(run, tmp_path / "model", device="cpu")
    # The embedding counts under both its names; the merger's norm has a weight and a bias.
    assert result["changed"] == {"vision": 8, "projector": 4, "language": 16}
    assert "onto" not in result
    base, weights = (load_file(f / "model.safetensors") for f in (lively_base, tmp_path / "model"))
    assert base.keys() == weights.keys()  # tied before and after
    trained, merged = opened(run), opened(tmp_path / "model")
    expected = logits_on(trained.model, trained.encoder)
    found = logits_on(merged.model, merged.encoder)
    assert float((expected - found).abs().max()) < 1e-4 * float(expected.abs().max())
    # Negative control: what trained is not the base.
    control = logits_on(base_of(lively_base), trained.encoder)
    assert float((expected - control).abs().max()) > 1e-2 * float(expected.abs().max())


def test_plain_peft_reads_it(run, lively_base, logits_on):
    """Without a line of ours, tied embedding and all."""
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base_of(lively_base), run / "checkpoints/step-000002")
    trained = opened(run)
    found = logits_on(model.base_model.model, trained.encoder)
    assert torch.equal(found, logits_on(trained.model, trained.encoder))


def drop_vision(merged: Any, base: Path) -> None:
    """The peers' defect: the tower of the merged model is the base's."""
    own = dict(base_of(base).named_parameters())
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if ".visual.blocks." in name:
                parameter.copy_(own[name])


@pytest.fixture
def broken_merge(lively_base, monkeypatch):
    merge_adapter = merge_module.merge_adapter

    def broken(tuned):
        merged = merge_adapter(tuned)
        drop_vision(merged, lively_base)
        return merged

    monkeypatch.setattr(merge_module, "merge_adapter", broken)


@pytest.mark.usefixtures("broken_merge")
def test_a_merge_that_drops_the_vision_adapter_is_found(run, tmp_path):
    with pytest.raises(MergeError, match="merging in memory changed the model"):
        merge(run, tmp_path / "model", device="cpu")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("broken_merge")
def test_where_the_logits_do_not_see_it_the_count_does(run, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "_require_equal", lambda *_: None)
    with pytest.raises(MergeError, match="the vision part was trained, but no tensor of it"):
        merge(run, tmp_path / "model", device="cpu")


LOST = {
    "the vision adapter": lambda name: ".visual.blocks." in name,
    "a magnitude": lambda name: name.endswith("layers.0.mlp.up_proj.lora_magnitude_vector"),
    "a module that trained in full": lambda name: name.endswith("merger.ln_q.weight"),
    "the embedding": lambda name: name.endswith("embed_tokens.weight"),
}


@pytest.mark.parametrize("what", LOST)
def test_a_place_left_empty_is_refused(what, run, lively_base, tmp_path):
    adapter = edited(
        adapter_of(run, tmp_path / "adapter"),
        lambda found: {name: t for name, t in found.items() if not LOST[what](name)},
    )
    with pytest.raises(ModelError, match=r"0 of its tensors match nothing.*places stay empty"):
        load_adapter(base_of(lively_base), adapter, trainable=False)


def test_a_key_that_matches_nothing_is_refused(run, lively_base, tmp_path):
    def rename(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("merger.ln_q", "merger.ln_k"): t for name, t in found.items()}

    adapter = edited(adapter_of(run, tmp_path / "adapter"), rename)
    with pytest.raises(ModelError, match=r"2 of its tensors match nothing.* 2 places stay empty"):
        load_adapter(base_of(lively_base), adapter, trainable=False)


def test_a_saved_module_of_another_shape_is_refused(run, lively_base, tmp_path):
    def shorten(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: tensor[:-1].contiguous() if "embed_tokens" in name else tensor
            for name, tensor in found.items()
        }

    adapter = edited(adapter_of(run, tmp_path / "adapter"), shorten)
    with pytest.raises(ModelError, match="does not fit this base"):
        load_adapter(base_of(lively_base), adapter, trainable=False)


def test_what_trains_is_fp32_over_a_bf16_base(run, lively_base, facts):
    for fresh in (True, False):
        model = load_model(lively_base, dtype=torch.bfloat16, device=CPU)
        if fresh:
            config = TuningConfig(method="dora", modules_to_save=("embed_tokens",))
            tuned = apply_tuning(model, config, facts, base_id="b")
        else:
            tuned = load_adapter(model, run / "checkpoints/step-000002", trainable=True)
        assert {p.dtype for p in tuned.trainable().values()} == {torch.float32}
        frozen = {p.dtype for n, p in model.named_parameters() if n not in tuned.trainable()}
        assert frozen == {torch.bfloat16}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert head.weight is embedding.weight


# Slower: the other methods, and heads that are not tied


@pytest.mark.slow
@pytest.mark.parametrize(
    "tuning",
    [
        {"method": "rslora"},
        {"method": "lora", "init": "gaussian", "targets": ["qkv", "fc1"], "train": ["vision"]},
        {"method": "lora", "init": "orthogonal", "targets": r".*visual.*mlp.*(fc1|\.0)"},
        {"method": "lora", "modules_to_save": ["merger"]},
    ],
)
def test_other_methods_merge(tuning, lively_base, make_recipe, tmp_path):
    recipe = make_recipe(
        model__base=str(lively_base), tuning={**PLAIN, **tuning}, training__max_steps=2
    )
    train(recipe, run_dir=tmp_path / "run")
    result = merge(tmp_path / "run", tmp_path / "model", dtype="fp32", device="cpu")
    assert result["max_logit_difference"] < 1e-3
    contract = opened(tmp_path / "run").contract
    assert {part for part, count in result["changed"].items() if count} == {*contract.trained}


@pytest.mark.slow
def test_a_run_of_everything_repeats_itself(run, tmp_path):
    from vlmtune.recipe import load_recipe

    train(load_recipe(run / "recipe.yaml"), run_dir=tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(run)


@pytest.mark.slow
def test_an_untied_head_trains_alone(tiny_base, make_recipe, tmp_path):
    import json

    base = copied(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = {n: t.clone() for n, t in load_file(base / "model.safetensors").items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    tuning = {**PLAIN, "modules_to_save": ["lm_head"]}
    recipe = make_recipe(model__base=str(base), tuning=tuning, training__max_steps=2)
    train(recipe, run_dir=tmp_path / "run")
    result = merge(tmp_path / "run", tmp_path / "model", device="cpu")
    assert result["changed"]["language"] == 15
    merged = load_file(tmp_path / "model/model.safetensors")
    embedding = "model.embed_tokens.weight"
    assert torch.equal(merged[embedding], weights[embedding])
    assert not torch.equal(merged["lm_head.weight"], weights["lm_head.weight"])
