"""The built-in base learns what the rows say, and nothing from rows whose answers were shuffled."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.quickstart.shapes import SHAPES
from vlmtune.quickstart.tasks import TASKS, write_task
from vlmtune.recipe import load_recipe
from vlmtune.verbs.train import train


def shuffled(table: Path, rows: int) -> Path:
    """The same table, each training picture with another one's answer."""
    records = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    order = list(range(rows))
    random.Random(0).shuffle(order)
    answers = [
        {key: records[at][key] for key in ("messages", "objects") if key in records[at]}
        for at in order
    ]
    for record, answer in zip(records, answers, strict=False):
        record.update(answer)
    out = table.with_name("shuffled.jsonl")
    out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return out


def learned(folder: Path, task: str, table: Path, held_out: int, *options: str) -> dict:
    """What was measured before and after, by metric, with intervals."""
    prepare(table, folder / "data", PrepareOptions(validation=held_out, workers=1))
    settings = ["model.base=builtin:base", f"data.path={folder / 'data'}", *options]
    train(load_recipe(TASKS[task].recipe, settings), run_dir=folder / "run")
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))["metrics"]
        for path in (folder / "run" / "evaluation").glob("*/metrics.json")
    }


def test_it_names_shapes_and_learns_nothing_from_shuffled_names(builtin_base, tmp_path):  # noqa: ARG001
    rows, held_out = 192, 64
    table = write_task(tmp_path / "pictures", "shapes", rows, held_out)
    # Steps enough to unlearn what the base knew: after 24 of eight rows, names that mean nothing
    # have taught it little more than to answer with a name.
    short = ("training.batch_size=4", "training.epochs=2", "evaluation.before=false")

    def accuracy(name, pictures):
        return learned(tmp_path / name, "shapes", pictures, held_out, *short)["after"]["accuracy"]

    true, control = accuracy("true", table), accuracy("shuffled", shuffled(table, rows))
    chance = 1 / len(SHAPES)
    assert true["value"] >= 0.95
    assert control["low"] <= chance
    assert control["value"] <= 2 * chance


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("task", ["formulas", "boxes"])
def test_it_learns_nothing_from_shuffled_answers(builtin_base, tmp_path, task):  # noqa: ARG001
    rows, held_out = 1500, 100
    table = shuffled(write_task(tmp_path / "pictures", task, rows, held_out), rows)
    after = learned(tmp_path, task, table, held_out)["after"]
    headline = {"formulas": "exact_match", "boxes": "box_accuracy_50"}[task]
    assert after[headline]["value"] <= 0.1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_real_formulas_get_better_beyond_doubt(builtin_base, tmp_path, shared_data):  # noqa: ARG001
    table = shared_data / "latex_ocr" / "latex_ocr.csv"
    # Their letters are a third as large as those that the base has read.
    larger = ("image.min_pixels=50176", "image.max_pixels=100352", "evaluation.max_new_tokens=160")
    # Pictures so large take long to look at: once each, by eyes that stay as they are.
    frozen = ("tuning.train=[language]", "tuning.learning_rates={}", "tuning.dropout=0")
    longer = ("training.batch_size=16", "training.learning_rate=6e-3", "training.epochs=6")
    larger = (*larger, *frozen, *longer)
    found = learned(tmp_path, "formulas", table, 200, *larger)
    before, after = found["before"]["edit_similarity"], found["after"]["edit_similarity"]
    assert before["high"] < after["low"]
