"""What the recipe's ``tuning`` and ``model`` sections may say; each mistake by its dotted name."""

from __future__ import annotations

import pytest

from vlmtune.errors import RecipeError
from vlmtune.recipe import recipe_from
from vlmtune.tuning.config import PARTS, TuningConfig

MISTAKES = [
    ({"method": "adalora"}, "tuning.method: "),
    ({"init": "pissa"}, "tuning.init: pissa writes other weights into the base"),
    ({"init": "pissa_niter_16"}, "tuning.init: pissa_niter_16 writes other weights"),
    ({"init": "olora"}, "tuning.init: olora writes other weights into the base"),
    ({"init": "loftq"}, "tuning.init: loftq writes other weights into the base"),
    ({"init": "zeros"}, "tuning.init: "),
    ({"init": "orthogonal", "rank": 5}, "tuning.init: orthogonal needs an even tuning.rank"),
    ({"init": "orthogonal", "method": "qlora"}, "tuning.init: orthogonal cannot begin over 4 bits"),
    ({"targets": []}, "tuning.targets: names no layer"),
    ({"targets": "q_proj("}, "tuning.targets: 'q_proj(' is no regular expression"),
    ({"train": []}, "tuning.train: names no part"),
    ({"train": ["audio"]}, "tuning.train.0: "),
    ({"freeze": ["language"]}, "tuning.freeze: train less freeze leaves nothing to train"),
    (
        {"targets": "all-linear", "train": ["vision"], "freeze": ["vision"]},
        "tuning.freeze: train less freeze leaves nothing",
    ),
    ({"method": "full", "freeze": list(PARTS)}, "tuning.freeze: train less freeze leaves nothing"),
    (
        {"method": "full", "modules_to_save": ["lm_head"]},
        "tuning.modules_to_save: stands beside adapters",
    ),
    (
        {"method": "full", "freeze": ["vision"], "learning_rates": {"vision": 1e-5}},
        "tuning.learning_rates: the vision part does not train",
    ),
    ({"learning_rates": {"vision": 0}}, "tuning.learning_rates.vision: "),
    ({"learning_rates": {"audio": 1e-5}}, "tuning.learning_rates.audio: no such option"),
    ({"method": "full"}, "model.quantization: full fine-tuning changes the weights"),
]
IN_MODEL = [
    ({"quantization": "int4"}, {}, "model.quantization: "),
    ({"quantization": "int8"}, {}, "model.quantization: int8 rounds the activations too"),
    ({"quantization": "int8"}, {"method": "qlora"}, "model.quantization: int8 rounds"),
    ({"quantization": "nf4"}, {"init": "orthogonal"}, "tuning.init: orthogonal cannot begin"),
    ({"device_map": "balanced"}, {}, "model.device_map: "),
    ({"device_map": "auto", "device": "cpu"}, {}, "model.device_map: auto spreads the layers"),
    ({"dtype": "fp16"}, {"method": "full"}, "model.dtype: full fine-tuning of fp16 weights"),
]


def recipe(tuning, **model):
    return recipe_from({"name": "x", "model": {"base": "b", **model}, "tuning": tuning})


@pytest.mark.parametrize(("tuning", "message"), MISTAKES)
def test_a_mistake_is_named(tuning, message):
    model = {"quantization": "nf4"} if "model." in message else {}
    with pytest.raises(RecipeError) as caught:
        recipe(tuning, **model)
    assert message in str(caught.value)
    assert "1 mistake" in str(caught.value)


@pytest.mark.parametrize(("model", "tuning", "message"), IN_MODEL)
def test_sections_that_contradict_each_other_are_named(model, tuning, message):
    with pytest.raises(RecipeError) as caught:
        recipe(tuning, **model)
    assert message in str(caught.value)


def test_what_may_be_said():
    assert recipe({}).tuning == TuningConfig(method="lora", rank=64, alpha=16, dropout=0.05)
    assert recipe({"method": "qlora"}).quantization == "nf4"
    assert recipe({"method": "dora"}, quantization="nf4").quantization == "nf4"
    assert recipe({}).quantization is None
    rates = recipe({"learning_rates": {"projector": 2e-5}}).tuning.learning_rates
    assert rates.named() == {"projector": 2e-5}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({}, ("language",)),
        ({"targets": "all-linear"}, ("language",)),
        ({"targets": ".*q_proj"}, PARTS),
        ({"targets": ".*q_proj", "freeze": ("vision",)}, ("projector", "language")),
        ({"train": ("language", "vision")}, ("vision", "language")),
        ({"method": "full"}, PARTS),
        ({"method": "full", "freeze": ("vision",)}, ("projector", "language")),
    ],
)
def test_parts_that_may_train(config, parts):
    assert TuningConfig(**config).trained_parts() == parts
