"""Which checkpoint stands for a run."""

from __future__ import annotations

import json
import logging
import shutil
from typing import Any

import pytest
import yaml

from tiny_world import copied
from vlmtune.errors import CheckpointError
from vlmtune.runs.best import PROBE_LOSS, best_by, best_checkpoint, best_step, chosen_checkpoint
from vlmtune.runs.checkpoints import checkpoints, seal, step_of
from vlmtune.runs.folder import RunFolder
from vlmtune.runs.resolve import resolve


@pytest.fixture
def run(lora_run, tmp_path):
    """A run with checkpoints at 2, 4 and 6, the best of which is 4 by ``cer``."""
    run = RunFolder(copied(lora_run, tmp_path / "run"))
    says(run, best_metric="cer")
    found(run, best_by="cer", best_step=4)
    return run


def says(run: RunFolder, **evaluation: Any) -> None:
    """Change the stored recipe."""
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    recipe["evaluation"] |= evaluation
    run.recipe.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def found(run: RunFolder, **state: Any) -> None:
    """Change what each checkpoint knows."""
    for path in checkpoints(run.checkpoints):
        file = path / "state.json"
        known = {**json.loads(file.read_text(encoding="utf-8")), **state}
        file.write_text(json.dumps(known), encoding="utf-8")
        (path / "manifest.json").unlink()
        seal(path, step_of(path))


@pytest.mark.parametrize(
    ("evaluation", "name"),
    [
        ({}, None),
        ({"best_metric": None, "stop_after": None}, None),
        ({"stop_after": 3}, PROBE_LOSS),
        ({"best_metric": "cer"}, "cer"),
        ({"best_metric": "cer", "stop_after": 3}, "cer"),
        ({"best_metric": PROBE_LOSS}, PROBE_LOSS),
    ],
)
def test_what_a_recipe_says(evaluation, name):
    assert best_by(evaluation) == name


def test_the_best_stands_for_the_run(run):
    assert best_step(run) == 4
    assert chosen_checkpoint(run).name == "step-000004"
    assert resolve(run.path).adapter == run.checkpoints / "step-000004"


def test_the_newest_does_where_nothing_is_said(run):
    """Negative control."""
    says(run, best_metric=None)
    assert best_step(run) is None
    assert best_checkpoint(run) is None
    assert chosen_checkpoint(run).name == "step-000006"


@pytest.mark.parametrize("state", [{"best_by": "bleu"}, {"best_by": ""}, {"best_step": None}])
def test_a_best_step_by_another_metric_is_none(run, state):
    """Of before the recipe was changed, or of a version that did not say by what."""
    found(run, **state)
    assert chosen_checkpoint(run).name == "step-000006"


def test_a_damaged_best_one_is_not_replaced_silently(run):
    with (run.checkpoints / "step-000004" / "adapter_model.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match="step-000004, the best checkpoint of the run, is da"):
        chosen_checkpoint(run)


def test_one_that_is_not_there_is_told(run, caplog):
    shutil.rmtree(run.checkpoints / "step-000004")
    with caplog.at_level(logging.WARNING):
        assert chosen_checkpoint(run).name == "step-000006"
    assert "the best step is 4, whose checkpoint is not there" in caplog.text


def test_a_damaged_newest_does_not_hide_it(run):
    (run.checkpoints / "step-000006" / "state.json").write_text("{", encoding="utf-8")
    assert chosen_checkpoint(run).name == "step-000004"


def test_a_run_without_checkpoints(run):
    shutil.rmtree(run.checkpoints)
    assert best_step(run) is None
    with pytest.raises(CheckpointError, match="has no checkpoint yet; continue it"):
        chosen_checkpoint(run)
