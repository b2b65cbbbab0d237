"""A tiny model, a small dataset and finished runs that the slow parts of the suite share.

Everything here is read only: a test that changes a run or a checkpoint copies it first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmtune.recipe import Recipe, recipe_from

TRAIN_ROWS, VALIDATION_ROWS = 24, 8
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with two layers, in the layout of a hub model."""
    from vlmtune.testing import TinySize, tiny

    size = TinySize(hidden=32, vision_width=16)
    return tiny("qwen2_vl", tmp_path_factory.mktemp("tiny") / "base", seed=1, size=size)


@pytest.fixture(scope="session")
def formula_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of rendered formulas."""
    from vlmtune.formulas import write_formula_table

    folder = tmp_path_factory.mktemp("formulas")
    return write_formula_table(folder, TRAIN_ROWS + VALIDATION_ROWS, seed=3)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, formula_table: Path) -> Path:
    """A prepared dataset: 24 train and 8 validation rows."""
    from vlmtune.data.prepare import PrepareOptions, prepare

    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(formula_table, out, PrepareOptions(validation=VALIDATION_ROWS))
    return out


def tiny_recipe(base: Path, data: Path, **changes: Any) -> Recipe:
    """A recipe whose run takes a second; changes are written ``training__batch_size=8``."""
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"base": str(base)},
        "data": {"path": str(data), "prompt": "Write this formula in LaTeX."},
        "image": {"max_pixels": 6272},
        "tuning": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "training": {
            "max_steps": 6,
            "batch_size": 5,  # six steps reach into a second epoch
            "learning_rate": 1e-2,
            "precision": "fp32",
            "save_steps": 2,
            "keep": 9,
            "workers": 0,
            "token_budget": 256,  # so that a step is several forwards
        },
        "evaluation": {"before": False, "after": False, "probe": 4},
    }
    for name, value in changes.items():
        section, _, option = name.partition("__")
        if option:
            values.setdefault(section, {})[option] = value
        else:
            values[section] = value
    return recipe_from(values)


@pytest.fixture(scope="session")
def make_recipe(tiny_base: Path, tiny_data: Path) -> MakeRecipe:
    """``tiny_recipe`` on the shared base and dataset."""

    def make(**changes: Any) -> Recipe:
        return tiny_recipe(tiny_base, tiny_data, **changes)

    return make


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe) -> Path:
    """A finished LoRA run of six steps with checkpoints at 2, 4 and 6. Copy before changing it."""
    from vlmtune.verbs.train import train

    folder = tmp_path_factory.mktemp("runs") / "lora"
    train(make_recipe(), run_dir=folder)
    return folder


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe) -> Path:
    """A finished run that trained every weight. Copy before changing it."""
    from vlmtune.verbs.train import train

    folder = tmp_path_factory.mktemp("runs") / "full"
    train(full_recipe(make_recipe), run_dir=folder)
    return folder


def full_recipe(make_recipe: MakeRecipe, **changes: Any) -> Recipe:
    """A recipe that trains the weights themselves."""
    return make_recipe(tuning={"method": "full"}, training__learning_rate=1e-3, **changes)


def copied(run: Path, to: Path) -> Path:
    """A copy of a run, that a test may damage."""
    shutil.copytree(run, to)
    return to


def lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fingerprint(run: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on whether it was interrupted.

    The last checkpoint by content hash (weights, optimizer, random states), every step's figures
    as exact bits, and the rows in the order in which they were trained.
    """
    from vlmtune.runs.checkpoints import checkpoints, faults

    last = checkpoints(run / "checkpoints")[-1]
    assert faults(last) == []
    files = sorted(last.glob("*.safetensors"))
    state = json.loads((last / "state.json").read_text(encoding="utf-8"))
    names = ("loss", "learning_rate", "gradient_norm", "probe_loss")
    return {
        "checkpoint": last.name,
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "state": {name: value for name, value in state.items() if name != "seconds"},
        "steps": [
            (step["step"], {name: step[name].hex() for name in names if name in step})
            for step in lines(run / "metrics.jsonl")
        ],
        "rows": [
            (record["step"], record["ids"])
            for record in lines(run / "ledger.jsonl")
            if record["event"] == "trained"
        ],
    }
