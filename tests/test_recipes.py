"""The shipped recipes meet their families: images, targets, and a whole run of the document one."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from docvqa_table import parquet
from tiny_world import lines
from vlmtune.data.media import ImagePolicy
from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.errors import UsageError
from vlmtune.models.families import load_family
from vlmtune.models.load import load_model
from vlmtune.recipe import load_recipe, shipped_recipes
from vlmtune.testing import TinySize, tiny

# What the hub's model of each recipe says its type is.
FAMILY_OF = {
    "latex-ocr": "qwen2_vl",
    "coco-caption": "qwen2_vl",
    "docvqa-idefics2": "idefics2",
    "qwen2.5-vl-latex-ocr": "qwen2_5_vl",
    "qwen2.5-vl-grounding": "qwen2_5_vl",
    "qwen3-vl-latex-ocr": "qwen3_vl",
    "qwen3-vl-grounding": "qwen3_vl",
    "qwen-vl-chat-lora": "qwen_vl",
    "qwen-vl-chat-qlora": "qwen_vl",
    "qwen-vl-chat-nf4": "qwen_vl",
    "qwen-vl-chat-full": "qwen_vl",
    "qwen-vl-lora": "qwen_vl",
    "smolvlm-latex-ocr": "idefics3",
    "smolvlm-grounding": "idefics3",
}
QUICKSTART = {"quickstart", "quickstart-shapes", "quickstart-boxes"}  # on the built-in base
SIZE = TinySize(hidden=32, vision_width=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    names = sorted({*FAMILY_OF.values(), "smolvlm"})
    return {name: tiny(name, root / name, size=SIZE) for name in names}


@pytest.mark.parametrize("name", FAMILY_OF)
def test_the_image_options_are_the_family_s(name, folders):
    recipe = load_recipe(name)
    family = load_family(str(folders[FAMILY_OF[name]]))
    settled = family.settle(recipe.image)
    given = recipe.image.model_dump(exclude_none=True)
    assert {key: getattr(settled, key) for key in given} == given


def test_an_option_of_another_family_is_refused(folders):
    """The control of the test above."""
    with pytest.raises(UsageError, match="longest_edge"):
        load_family(str(folders["qwen3_vl"])).settle(ImagePolicy(longest_edge=512))
    with pytest.raises(UsageError, match="max_pixels"):
        load_family(str(folders["idefics3"])).settle(ImagePolicy(max_pixels=50176))


def test_smolvlm_recipes_fit_its_second_version_too(folders):
    for name in ("smolvlm-latex-ocr", "smolvlm-grounding"):
        # The tiny model's tiles are smaller, and its vocabulary names fewer of them.
        image = load_recipe(name).image.model_copy(update={"longest_edge": 112})
        assert load_family(str(folders["smolvlm"])).settle(image).split


def test_every_recipe_is_known_here():
    assert shipped_recipes().keys() == FAMILY_OF.keys() | QUICKSTART


def test_the_document_recipe_is_the_workflow_s():
    recipe = load_recipe("docvqa-idefics2")
    assert recipe.model.base == "HuggingFaceM4/idefics2-8b"
    assert recipe.quantization == "nf4"
    assert recipe.image == ImagePolicy(split=False)
    assert recipe.data.answers == "drawn"
    assert recipe.data.instruction == "Answer briefly."
    tuning, training = recipe.tuning, recipe.training
    assert (tuning.rank, tuning.alpha, tuning.dropout, tuning.init) == (8, 8, 0.1, "gaussian")
    figures = (training.max_steps, training.batch_size, training.warmup_steps, training.keep)
    assert figures == (178, 2 * 8, 75, 1)
    assert (training.learning_rate, training.weight_decay) == (1e-4, 0.01)
    assert (training.log_steps, training.save_steps, training.precision) == (5, 25, "fp16")
    assert recipe.evaluation.metrics == ("anls",)


def test_the_document_recipe_s_targets(folders):
    import torch

    model = load_model(folders["idefics2"], dtype=torch.float32, device=torch.device("cpu"))
    targets = load_recipe("docvqa-idefics2").tuning.targets
    assert isinstance(targets, str)
    found = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
    kinds = {name.rsplit(".", 1)[-1] for name in found}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
    assert {name.split(".")[1] for name in found if "." in name} == {"text_model", "connector"}
    assert not any("vision_model" in name for name in found)


# A run


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docvqa")
    (folder / "train.parquet").write_bytes(parquet(12))
    columns = {"image": "image", "question": "query.en", "answers": "answers"}
    prepare(
        folder / "train.parquet", folder / "data", PrepareOptions(columns=columns, validation=3)
    )
    return folder / "data"


SMALL = (
    "training.max_steps=2",
    "training.batch_size=4",
    "training.workers=0",
    "evaluation.max_new_tokens=4",
    "evaluation.probe=2",
)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.mark.parametrize(
    "changes",
    [
        ("tuning.method=lora", "model.quantization=null", "training.precision=fp32"),
        pytest.param(("training.precision=fp32",), marks=[needs_bitsandbytes, pytest.mark.slow]),
    ],
    ids=["lora", "qlora"],
)
def test_the_document_recipe_runs(changes, folders, pages, tmp_path):
    from vlmtune.verbs.train import train

    given = (f"model.base={folders['idefics2']}", f"data.path={pages}", *SMALL, *changes)
    recipe = load_recipe("docvqa-idefics2", given)
    result = train(recipe, run_dir=tmp_path / "run")
    assert result["steps"] == 2
    assert result["before"].keys() == result["after"].keys() == {"anls"}
    trained = [each for each in lines(tmp_path / "run/ledger.jsonl") if each["event"] == "trained"]
    assert {number for each in trained for number in each["answers"]} >= {0, 1}
    written = (tmp_path / "run/evaluation/after/predictions.jsonl").read_text(encoding="utf-8")
    references = [json.loads(line)["references"] for line in written.splitlines()]
    assert sorted(len(each) for each in references) == [1, 2, 3]
