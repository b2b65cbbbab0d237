"""Training the tiny Qwen-VL as the recipes say: learnt, talked with, merged, over packed bits."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from safetensors.torch import load_file, save_file

from gptq_pack import packed_copy
from tiny_world import lines, tiny_recipe
from vlmtune.data.boxes import to_grid
from vlmtune.data.media import Size
from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.errors import ModelError, RecipeError, RefusedError, UsageError
from vlmtune.models.families import family_class
from vlmtune.models.gptq import GptqLinear
from vlmtune.models.load import LoadingConfig
from vlmtune.models.qwen_vl.configuration import QwenVLConfig
from vlmtune.models.qwen_vl.talk import Talk
from vlmtune.recipe import load_recipe
from vlmtune.runs.resolve import open_model, resolve
from vlmtune.testing import tiny
from vlmtune.tuning.apply import apply_tuning
from vlmtune.tuning.parts import count_parts
from vlmtune.verbs.merge import merge
from vlmtune.verbs.predict import predict
from vlmtune.verbs.train import train

CPU = LoadingConfig(device="cpu")
COLOURS = ("red", "white")
WHERE, COLOUR = "Where is it?", "What colour is the box?"


def box_of(number: int) -> tuple[Size, tuple[int, int, int, int]]:
    """Size of a picture, and the rectangle in it, in pixels."""
    rng = np.random.default_rng(number)
    size = Size(*(int(side) for side in rng.integers(60, 120, 2)))
    x1, y1 = int(rng.integers(0, size.width // 2)), int(rng.integers(0, size.height // 2))
    x2, y2 = x1 + int(rng.integers(10, size.width // 2)), y1 + int(rng.integers(10, 30))
    return size, (x1, y1, x2, y2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lively base, pictures with a coloured rectangle, and conversations about them."""
    root = tmp_path_factory.mktemp("qwen_vl")
    base = tiny("qwen_vl", root / "base", seed=5)
    weights = load_file(base / "model.safetensors")
    larger = {
        name: tensor * (8 if tensor.dim() > 1 and not name.endswith(("wte.weight", "embed")) else 1)
        for name, tensor in weights.items()
    }
    save_file(larger, base / "model.safetensors", metadata={"format": "pt"})
    rows: list[dict[str, Any]] = []
    for number, colour in enumerate(COLOURS):
        size, corners = box_of(number)
        noise = np.random.default_rng(number).integers(0, 256, (size.height, size.width, 3))
        image = Pictures.fromarray(noise.astype(np.uint8))
        image.paste(colour, corners)
        image.save(root / f"{number}.png")
        x1, y1, x2, y2 = to_grid(corners, size, 1000)
        boxed = f"<ref>{colour}</ref><box>({x1},{y1}),({x2},{y2})</box>"
        shown = f"Picture 1: <img>{number}.png</img>\n"
        rows.append(said(f"one{number}", shown + WHERE, boxed))
        rows.append(said(f"two{number}", shown + COLOUR, colour, WHERE, boxed))
    (root / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    prepare(root / "rows.json", root / "data", PrepareOptions())
    return root


def said(name: str, *texts: str) -> dict[str, Any]:
    turns = zip(("user", "assistant") * len(texts), texts, strict=False)
    return {"id": name, "conversations": [{"from": role, "value": text} for role, text in turns]}


def recipe(world: Path, base: Path | None = None, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "image": {},
        "data__prompt": None,
        "tuning": {"rank": 16, "alpha": 32, "dropout": 0.0},
        "training__max_steps": 2,
        "training__save_steps": 50,
        "training__batch_size": 4,
        "training__token_budget": 1024,
        "evaluation": {"before": False, "after": False, "probe": 0},
    }
    return tiny_recipe(base or world / "base", world / "data", **{**options, **changes})


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """A run that has learnt all rows by heart."""
    train(
        recipe(world, training__max_steps=30, training__schedule="cosine"),
        run_dir=world / "run",
    )
    return world / "run"


def near(found: list[float], meant: tuple[int, ...]) -> bool:
    return all(abs(one - other) <= 1 for one, other in zip(found, meant, strict=True))


def test_boxes_come_back_within_a_pixel(world, run):
    for number, colour in enumerate(COLOURS):
        answer = predict(run, [world / f"{number}.png"], WHERE, loading=CPU)
        (box,) = json.loads(json.dumps(answer))["boxes"]
        assert (box["label"], box["image"]) == (colour, 0)
        assert near(box["xyxy"], box_of(number)[1])
        # The controls: another picture's box is far, and the base has not learnt any.
        assert not near(box["xyxy"], box_of((number + 1) % len(COLOURS))[1])
    before = predict(world / "base", [world / "0.png"], WHERE, loading=CPU, max_new_tokens=30)
    assert before["boxes"] == []


def test_a_conversation_over_two_turns(world, run):
    opened = open_model(resolve(run), CPU)
    for number, colour in enumerate(COLOURS):
        talk = Talk(opened.model, opened.encoder)
        assert talk.ask(COLOUR, [world / f"{number}.png"]) == colour
        assert talk.ask(WHERE).startswith(f"<ref>{colour}</ref><box>(")
        box = talk.conversation.messages[-1].content[0]
        assert near(box.xyxy, box_of(number)[1])
        drawn = talk.drawn()
        assert Size(*drawn.size) == box_of(number)[0]
    # The control: the second question alone, without the picture of the first.
    assert not Talk(opened.model, opened.encoder).ask(WHERE).startswith(f"<ref>{colour}</ref><box>")


def test_merged_is_the_adapter(world, run, tmp_path):
    result = merge(run, tmp_path / "model", device="cpu")
    assert result["greedy_equal"]
    assert result["max_logit_difference"] < 1e-3
    assert result["changed"] == {"vision": 0, "projector": 0, "language": 8}
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen"
    assert "auto_map" not in config
    pictures = [world / "1.png"]
    answers = [predict(each, pictures, WHERE, loading=CPU) for each in (run, tmp_path / "model")]
    assert [each.pop("seconds") > 0 for each in answers] == [True, True]
    assert answers[0] == answers[1]


# Over weights packed by GPTQ


@pytest.fixture(scope="module")
def packed(world: Path) -> Path:
    return packed_copy(world / "base", world / "int4", group_size=32)


def test_over_packed_weights(world, packed, tmp_path):
    tuning = {"method": "qlora", "rank": 4}
    chosen = recipe(world, packed, tuning=tuning, training__precision="bf16")
    result = train(chosen, run_dir=tmp_path / "run")
    assert result["steps"] == 2
    opened = open_model(resolve(tmp_path / "run"), CPU)
    layers = [module for module in opened.model.modules() if isinstance(module, GptqLinear)]
    assert len(layers) == 10
    assert opened.contract.base.id == str(packed)  # the adapter knows over what it was trained
    assert opened.contract.quantization is None
    assert predict(tmp_path / "run", [world / "0.png"], WHERE, loading=CPU, max_new_tokens=2)
    with pytest.raises(RefusedError, match=r"packed in 4 bits by GPTQ\. Adding an"):
        merge(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    for held in ("none", "nf4"):
        with pytest.raises(UsageError, match=f"found '{held}', but the weights of"):
            open_model(resolve(tmp_path / "run"), LoadingConfig(device="cpu", quantization=held))


def test_packed_weights_neither_train_nor_are_packed_again(world, packed, tmp_path):
    full = recipe(world, packed, tuning={"method": "full"})
    with pytest.raises(RecipeError, match=r"tuning.method: full .* packed in 4 bits by GPTQ"):
        train(full, run_dir=tmp_path / "full")
    again = recipe(world, packed, tuning={"method": "qlora"}, model__quantization="nf4")
    with pytest.raises(ModelError, match="quantised already"):
        train(again, run_dir=tmp_path / "again")


@pytest.mark.slow
def test_a_run_over_packed_weights_goes_on_where_it_stopped(world, packed, tmp_path):
    from tiny_world import fingerprint

    changes = {"tuning": {"method": "qlora", "rank": 4}, "training__save_steps": 1}
    train(recipe(world, packed, **changes), run_dir=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-000002")
    (tmp_path / "cut/result.json").unlink()
    train(recipe(world, packed, **changes), run_dir=tmp_path / "cut", resume=True)
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")


# The recipes


RECIPES = ("qwen-vl-chat-lora", "qwen-vl-lora", "qwen-vl-chat-qlora", "qwen-vl-chat-full")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.mark.parametrize("name", [*RECIPES, "qwen-vl-chat-nf4"])
def test_a_recipe_holds_the_originals_figures(name):
    recipe = load_recipe(name)
    training, tuning = recipe.training, recipe.tuning
    assert (training.epochs, training.learning_rate, training.schedule) == (5, 1e-5, "cosine")
    assert (training.warmup_ratio, training.weight_decay) == (0.01, 0.1)
    assert (training.betas, training.clip) == ((0.9, 0.95), 1.0)
    assert (training.log_steps, training.save_steps, training.keep) == (1, 1000, 10)
    assert training.gradient_checkpointing == "auto"
    assert recipe.data.max_length == 2048
    assert training.batch_size == (128 if tuning.method == "full" else 8)
    assert training.precision == ("fp16" if name == "qwen-vl-chat-qlora" else "bf16")
    if tuning.method == "full":
        assert tuning.trained_parts() == ("projector", "language")
        return
    assert (tuning.rank, tuning.alpha, tuning.dropout) == (64, 16, 0.05)
    assert tuning.targets == family_class("qwen").facts.lora_targets
    assert tuning.modules_to_save == (("wte", "lm_head") if name == "qwen-vl-lora" else ())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*RECIPES, pytest.param("qwen-vl-chat-nf4", marks=needs_bitsandbytes)]
)
def test_a_recipe_runs(name, world, packed, tmp_path):
    over_packed = name == "qwen-vl-chat-qlora"
    base = packed if over_packed else world / "base"
    chosen = load_recipe(
        name,
        [
            f"model.base={base}",
            f"data.path={world / 'data'}",
            "training.max_steps=3",
            "training.workers=0",
            f"training.precision={'fp16' if over_packed else 'fp32'}",
            "training.learning_rate=1e-2",
            "training.warmup_steps=0",
            "evaluation.before=false",
            "evaluation.after=false",
        ],
    )
    train(chosen, run_dir=tmp_path / "run")
    steps = lines(tmp_path / "run" / "metrics.jsonl")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert all(step["applied"] for step in steps)
    if over_packed:
        return
    result = merge(tmp_path / "run", tmp_path / "model", dtype="fp32", device="cpu")
    assert result["max_logit_difference"] < 1e-4
    assert result["changed"]["vision"] == 0
    assert (result["changed"]["projector"] > 0) == (name == "qwen-vl-chat-full")
    before = load_file(world / "base" / "model.safetensors")
    after = load_file(tmp_path / "model" / "model.safetensors")
    moved = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    if name == "qwen-vl-chat-lora":
        kinds = {key.split(".", 3)[3] for key in moved}
        layers = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")
        assert kinds == {f"{layer}.weight" for layer in layers}
    if name == "qwen-vl-lora":
        assert moved >= {"transformer.wte.weight", "lm_head.weight"}
    if name == "qwen-vl-chat-full":
        pool = "transformer.visual.attn_pool."
        assert {key for key in before if key.startswith(pool)} <= moved  # its positions too
        tower = {key for key in before if key.startswith("transformer.visual.")}
        assert not moved & {key for key in tower if not key.startswith(pool)}


# Real sizes, on the meta device


@pytest.fixture(scope="module")
def real() -> Any:
    from vlmtune.models.qwen_vl.modeling import QwenVLForConditionalGeneration

    with torch.device("meta"):
        return QwenVLForConditionalGeneration(QwenVLConfig())


@pytest.mark.slow
def test_what_trains_at_the_real_size(real):
    facts = family_class("qwen").facts
    whole = count_parts(real, facts, trainable=False)
    assert sum(whole.values()) == 9_656_935_168
    assert whole["vision"] + whole["projector"] == 1_935_610_624
    assert whole["projector"] == 76_054_528
    with torch.device("meta"):
        full = apply_tuning(real, load_recipe("qwen-vl-chat-full").tuning, facts, base_id="base")
        trains = count_parts(full.model, facts, trainable=True)
        assert (trains["vision"], sum(trains.values())) == (0, 7_797_379_072)
        real.requires_grad_(False)
        lora = load_recipe("qwen-vl-chat-lora").tuning
        tuned = apply_tuning(real, lora, facts, base_id="base")
    trains = count_parts(tuned.model, facts, trainable=True)
    assert trains == {"vision": 0, "projector": 0, "language": 112_197_632}
    adapted = {name.partition(".lora_")[0].split(".", 3)[3] for name in tuned.trainable()}
    assert adapted == {"attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2"}
