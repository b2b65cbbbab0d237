"""Where adapters go: by name, by expression, or everywhere, and never into a frozen part."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from vlmtune.errors import RecipeError
from vlmtune.models.families import load_family
from vlmtune.models.load import load_model
from vlmtune.tuning.apply import apply_tuning
from vlmtune.tuning.config import PARTS, TuningConfig
from vlmtune.tuning.parts import part_of
from vlmtune.tuning.targets import exact_pattern, find_targets

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def model(tiny_base):
    """Read only: finding targets changes nothing."""
    return load_model(tiny_base, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def facts(tiny_base):
    return load_family(str(tiny_base)).facts


def found(model, facts, **config):
    return find_targets(model, TuningConfig(**config), facts)


def adapted(model, facts, **config):
    return set(found(model, facts, **config).adapted)


def linear(model, facts, *parts):
    """Every linear layer of these parts but the head, counted without our code."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and part_of(name, facts) in parts
    }


def test_names_mean_layers_of_the_language_model(model, facts):
    everywhere = linear(model, facts, "language")
    assert adapted(model, facts) == everywhere
    assert {name.rsplit(".", 1)[-1] for name in everywhere} == SEVEN
    assert adapted(model, facts, targets=("q_proj",)) == {
        f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)
    }
    assert adapted(model, facts, targets=("mlp.up_proj", "lm_head")) == {
        "model.language_model.layers.0.mlp.up_proj",
        "model.language_model.layers.1.mlp.up_proj",
        "lm_head",
    }


def test_all_linear_reaches_the_parts_that_train(model, facts):
    assert adapted(model, facts, targets="all-linear") == linear(model, facts, "language")
    assert adapted(model, facts, targets="all-linear", train=("projector",)) == {
        "model.visual.merger.mlp.0",
        "model.visual.merger.mlp.2",
    }
    assert adapted(model, facts, targets="all-linear", train=PARTS) == linear(model, facts, *PARTS)
    without = adapted(model, facts, targets="all-linear", train=PARTS, freeze=("language",))
    assert without == linear(model, facts, "vision", "projector")


def test_names_reach_the_parts_that_train(model, facts):
    chosen = adapted(model, facts, targets=("q_proj", "qkv"), train=("vision", "language"))
    assert {part_of(name, facts) for name in chosen} == {"vision", "language"}
    assert len(chosen) == 4


def test_an_expression_reaches_what_it_matches_and_nothing_frozen(model, facts):
    expression = r".*(visual\.blocks|layers).*(qkv|q_proj)|model\.visual\.merger\.mlp\.0"
    assert {part_of(name, facts) for name in adapted(model, facts, targets=expression)} == {*PARTS}
    left = adapted(model, facts, targets=expression, freeze=("vision",))
    assert {part_of(name, facts) for name in left} == {"projector", "language"}
    only = adapted(model, facts, targets=expression, train=("vision",))
    assert {part_of(name, facts) for name in only} == {"vision"}
    assert adapted(model, facts, targets=".*q_proj|lm_head$") >= {"lm_head"}


MISTAKES = [
    ({"targets": ("q_porj",)}, r"tuning\.targets: 'q_porj' matches no module.*q_proj"),
    ({"targets": ("q_proj", "w1")}, r"tuning\.targets: 'w1' matches no module"),
    ({"targets": ("fc1",)}, r"tuning\.targets: 'fc1' is a layer of vision alone, which does not"),
    ({"targets": ("norm1",), "train": ("vision",)}, r"'norm1' matches no module"),
    ({"targets": "q_proj"}, r"the expression 'q_proj' matches no module.*\[q_proj, v_proj\]"),
    ({"targets": r"model\.vision_tower\..*"}, r"matches no module of the model"),
    ({"targets": r".*layers\.0\..*"}, r"matches model\.language_model\.layers\.0\.\w+, a Qwen2"),
    ({"targets": r".*\.fc1", "freeze": ("vision",)}, r"all 2 layers .* do not train"),
    (
        {"train": ("vision", "language")},
        r"tuning\.train: the vision part should train, but no adapter goes .*fc1.*all-linear",
    ),
    ({"modules_to_save": ("head",)}, r"tuning\.modules_to_save: 'head' matches no module"),
    ({"modules_to_save": ("blocks",)}, r"tuning\.modules_to_save: .* is a ModuleList"),
    ({"modules_to_save": ("mlp.act_fn",)}, r"tuning\.modules_to_save: .* has no weights"),
    (
        {"modules_to_save": ("merger",), "freeze": ("projector",)},
        r"tuning\.modules_to_save: .*merger belongs to the projector part, which tuning\.freeze",
    ),
    (
        {"modules_to_save": ("layers.0.mlp",)},
        r"tuning\.modules_to_save: .*layers\.0\.mlp trains in full, and .* inside it",
    ),
    (
        {"modules_to_save": ("merger", "merger.mlp.0")},
        r"tuning\.modules_to_save: .*merger trains in full, and .*merger\.mlp\.0 inside it",
    ),
    (
        {"modules_to_save": ("embed_tokens",), "targets": ("q_proj", "lm_head")},
        r"embed_tokens and lm_head share their weights, and tuning\.targets adapts lm_head",
    ),
]


@pytest.mark.parametrize(("config", "message"), MISTAKES)
def test_a_mistake_says_what_there_is(config, message, model, facts):
    with pytest.raises(RecipeError, match=message):
        found(model, facts, **config)


def test_a_learning_rate_of_a_part_without_adapters_is_refused(model, facts):
    config = TuningConfig(learning_rates={"vision": 1e-5})
    with pytest.raises(RecipeError, match=r"tuning\.learning_rates: the vision part does not"):
        apply_tuning(model, config, facts, base_id="b")


def test_modules_to_save(model, facts):
    targets = found(model, facts, modules_to_save=("merger", "layers.0.input_layernorm"))
    assert targets.saved == (
        "model.visual.merger",
        "model.language_model.layers.0.input_layernorm",
    )
    assert not targets.tied


@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), ("lm_head", "embed_tokens")])
def test_a_tied_embedding_is_one_tensor_under_two_names(names, model, facts):
    targets = found(model, facts, modules_to_save=names)
    assert targets.saved == ("model.language_model.embed_tokens",)
    assert targets.tied


# The expression that is written into an adapter's configuration


def test_a_pattern_matches_what_was_chosen_and_nothing_else(model, facts):
    names = [name for name, _ in model.named_modules()]
    choices = [
        found(model, facts).adapted,
        found(model, facts, targets="all-linear", train=PARTS).adapted,
        found(model, facts, targets=r".*layers\.1\..*proj").adapted,
        ("lm_head",),
    ]
    for chosen in choices:
        pattern = exact_pattern(chosen, names)
        assert {name for name in names if re.fullmatch(pattern, name)} == set(chosen)
    assert r"layers\.\d+\." in exact_pattern(choices[0], names)
    # Negative control: what a careless pattern would take along.
    careless = "|".join(rf".*{name.rsplit('.', 1)[-1]}" for name in choices[2])
    assert {name for name in names if re.fullmatch(careless, name)} > set(choices[2])
