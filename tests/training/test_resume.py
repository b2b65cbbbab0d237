"""A run that was stopped and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_world import MakeRecipe, copied, fingerprint, full_recipe, lines
from vlmtune.errors import ChangedError
from vlmtune.recipe import Recipe
from vlmtune.runs.checkpoints import checkpoints, newest_good
from vlmtune.training import checkpoint
from vlmtune.training.distributed.strategy import Strategy
from vlmtune.training.loop import StepReport, StoppedError
from vlmtune.verbs import train as verb_module
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.train import train

KINDS = ("lora", "full")


class Stop(Observer):
    """Sends this process a signal when a step is done."""

    def __init__(self, step: int, number: int = signal.SIGTERM, times: int = 1) -> None:
        self._step, self._number, self._times = step, number, times

    def step(self, report: StepReport) -> None:
        if report.step == self._step:
            for _ in range(self._times):
                os.kill(os.getpid(), self._number)


class Fall(Observer):
    """Breaks off without saving, as a power cut would, after a step's lines are written."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, report: StepReport) -> None:
        if report.step == self._step:
            raise KeyboardInterrupt


def recipe_of(kind: str, make_recipe: MakeRecipe, **changes: Any) -> Recipe:
    return make_recipe(**changes) if kind == "lora" else full_recipe(make_recipe, **changes)


@pytest.fixture
def reference(request: pytest.FixtureRequest) -> Any:
    def of(kind: str) -> dict[str, Any]:
        return fingerprint(request.getfixturevalue(f"{kind}_run"))

    return of


def stopped_run(recipe: Recipe, folder: Path, step: int) -> Path:
    with pytest.raises(StoppedError, match="--resume") as caught:
        train(recipe, run_dir=folder, observer=Stop(step))
    assert caught.value.exit_status == 143
    assert checkpoints(folder / "checkpoints")[-1].name == f"step-{step:06d}"
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe) -> Any:
    """A run of each kind, stopped after the third of six steps, where nothing would be saved."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("stopped") / kind
            made[kind] = stopped_run(recipe_of(kind, make_recipe), folder, step=3)
        return made[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_repeats_itself(kind, make_recipe, tmp_path, reference):
    """Without this control the others would mean nothing. Three runs, one with loader threads."""
    expected = reference(kind)
    random.seed(17)  # what this process drew before must not matter
    np.random.seed(17)
    torch.manual_seed(17)
    train(recipe_of(kind, make_recipe), run_dir=tmp_path / "again")
    assert fingerprint(tmp_path / "again") == expected
    train(recipe_of(kind, make_recipe, training__workers=2), run_dir=tmp_path / "threads")
    assert fingerprint(tmp_path / "threads") == expected


def test_the_reference_has_something_to_get_wrong(reference):
    """The weights move, and the last steps are of a second epoch."""
    found = reference("lora")
    assert len(found["steps"]) == 6
    assert found["state"]["samples"] == 30
    assert found["state"]["step"] == 6
    losses = [float.fromhex(figures["loss"]) for _, figures in found["steps"]]
    assert len(set(losses)) == 6
    ids = [row for _, rows in found["rows"] for row in rows]
    assert len(set(ids[:24])) == 24
    assert ids[24:] != ids[:6]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_dropout_draws(make_recipe, tmp_path, reference):
    train(make_recipe(tuning__dropout=0.0), run_dir=tmp_path / "run")
    assert fingerprint(tmp_path / "run")["steps"] != reference("lora")["steps"]


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_is_uninterrupted(kind, make_recipe, tmp_path, interrupted, reference):
    run = copied(interrupted(kind), tmp_path / "run")
    train(recipe_of(kind, make_recipe), run_dir=run, resume=True)
    found, expected = fingerprint(run), reference(kind)
    assert found == expected


def test_stopped_and_resumed_with_loader_threads(make_recipe, tmp_path, reference):
    recipe = make_recipe(training__workers=2)
    run = stopped_run(recipe, tmp_path / "run", step=3)
    train(recipe, run_dir=run, resume=True)
    assert fingerprint(run) == reference("lora")


@pytest.mark.slow
def test_stopped_twice(make_recipe, tmp_path, reference):
    recipe = make_recipe()
    run = stopped_run(recipe, tmp_path / "run", step=1)
    with pytest.raises(StoppedError):
        train(recipe, run_dir=run, resume=True, observer=Stop(5))
    train(recipe, run_dir=run, resume=True)
    assert fingerprint(run) == reference("lora")


@pytest.mark.parametrize(
    "step", [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3))]
)
def test_what_came_after_the_checkpoint_is_done_again(step, make_recipe, tmp_path, reference):
    """Steps 1, 3 and (its line written, its checkpoint not) 6 are lost and trained once more."""
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(), run_dir=run, observer=Fall(step))
    assert len(lines(run / "metrics.jsonl")) == step
    train(make_recipe(), run_dir=run, resume=True)
    assert fingerprint(run) == reference("lora")


def test_a_second_signal_changes_nothing(make_recipe, tmp_path):
    observer = Stop(2, signal.SIGINT, times=3)
    with pytest.raises(StoppedError) as caught:
        train(make_recipe(), run_dir=tmp_path / "run", observer=observer)
    assert caught.value.exit_status == 130
    assert newest_good(tmp_path / "run" / "checkpoints").name == "step-000002"


def test_a_signal_after_the_last_step_leaves_only_the_rest(make_recipe, tmp_path, reference):
    run = stopped_run(make_recipe(), tmp_path / "run", step=6)
    assert not (run / "result.json").exists()
    result = train(make_recipe(), run_dir=run, resume=True)
    assert result["steps"] == 6
    assert fingerprint(run) == reference("lora")


# Negative controls: each state that is not put back must be seen.


def forget_randomness(tensors: Any, python: Any, ranks: Any) -> None:
    """Leaves the random states as they are."""


def forget_optimizer(strategy: Any, folder: Any) -> None:
    """Leaves the optimizer empty."""


def forget_counters(strategy: Any, folder: Any) -> None:
    """Puts back Adam's averages, but not its step counter."""
    RESTORE(strategy, folder)
    for state in strategy.optimizer.state.values():
        state["step"] = torch.zeros_like(state["step"])


RESTORE = Strategy.restore
FORGETTING = {
    "random state": (checkpoint, "_restore_random", forget_randomness, "lora"),
    "optimizer": (Strategy, "restore", forget_optimizer, "lora"),
    "optimizer, full": (Strategy, "restore", forget_optimizer, "full"),
    "step counter": (Strategy, "restore", forget_counters, "lora"),
}


@pytest.mark.parametrize("case", FORGETTING)
def test_a_forgotten_state_is_seen(
    case, make_recipe, tmp_path, interrupted, reference, monkeypatch
):
    place, name, forget, kind = FORGETTING[case]
    monkeypatch.setattr(place, name, forget)
    run = copied(interrupted(kind), tmp_path / "run")
    train(recipe_of(kind, make_recipe), run_dir=run, resume=True)
    found, expected = fingerprint(run), reference(kind)
    assert found["steps"][:3] == expected["steps"][:3]
    assert found["steps"][3:] != expected["steps"][3:]
    weights = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert found["files"][weights] != expected["files"][weights]


def test_a_changed_weight_is_seen(make_recipe, tmp_path, interrupted, reference):
    """One bit of one weight, under a manifest that vouches for it."""
    from safetensors.torch import load_file, save_file

    from vlmtune.runs.checkpoints import seal

    run = copied(interrupted("lora"), tmp_path / "run")
    folder = newest_good(run / "checkpoints")
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in sorted(weights) if "lora_A" in name)
    weights[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "manifest.json").unlink()
    seal(folder, 3)
    train(make_recipe(), run_dir=run, resume=True)
    assert fingerprint(run)["files"] != reference("lora")["files"]


# Precision, beginnings and ends


def test_fp16_scaler_is_checkpointed(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(training__precision="fp16", training__max_steps=4, model__dtype="fp32")
    train(recipe, run_dir=tmp_path / "whole")
    run = stopped_run(recipe, tmp_path / "run", step=1)
    state = json.loads((run / "checkpoints/step-000001/state.json").read_text(encoding="utf-8"))
    assert state["scaler"]["scale"] > 1
    loaded: list[dict[str, Any]] = []
    load = torch.amp.GradScaler.load_state_dict
    monkeypatch.setattr(
        torch.amp.GradScaler,
        "load_state_dict",
        lambda self, value: (loaded.append(value), load(self, value)),
    )
    train(recipe, run_dir=run, resume=True)
    assert loaded == [state["scaler"]]
    assert fingerprint(run) == fingerprint(tmp_path / "whole")


def test_resume_without_a_checkpoint_starts_at_0(make_recipe, tmp_path, reference):
    train(make_recipe(), run_dir=tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == reference("lora")


def test_resume_of_a_finished_run_says_so(make_recipe, lora_run, tmp_path, caplog):
    run = copied(lora_run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    with caplog.at_level(logging.WARNING):
        result = train(make_recipe(), run_dir=run, resume=True)
    assert "is finished" in caplog.text
    assert result == json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}


def test_rows_left_out_are_those_of_the_plan_in_force(make_recipe, tmp_path):
    """Options that change with leave adds up like a run that began with them."""
    from vlmtune.runs.folder import RunFolder
    from vlmtune.training.summary import account

    run = stopped_run(make_recipe(data__max_length=85), tmp_path / "run", step=1)
    left_out = account(RunFolder(run))["dropped"]["too_long"]
    assert 0 < left_out < 24
    with (run / "ledger.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"event": "trai')  # as a kill leaves it
    train(make_recipe(), run_dir=run, resume=True, allow_change=True)
    found = account(RunFolder(run))
    assert found["dropped"] == {}
    assert found["trained"] + found["not_reached"] + found["validation"] == found["in"] == 32
    (change,) = [line for line in lines(run / "ledger.jsonl") if line["event"] == "changed"]
    assert change["changes"] == ["data.max_length: 85 is now 8192"]


def test_batch_and_seed_are_fixed_within_a_run(make_recipe, tmp_path):
    run = stopped_run(make_recipe(), tmp_path / "run", step=1)
    for name, value in (("training__batch_size", 4), ("training__seed", 1)):
        with pytest.raises(ChangedError, match="trained twice or not at all"):
            train(make_recipe(**{name: value}), run_dir=run, resume=True, allow_change=True)
    harmless = make_recipe(training__workers=2, training__log_steps=3)
    train(harmless, run_dir=run, resume=True)


def test_a_resumed_run_cuts_its_steps_as_before(make_recipe, tmp_path, monkeypatch):
    """On another machine the default budget differs; the packs of a run must not."""
    recipe = make_recipe(training__token_budget=None)
    train(recipe, run_dir=tmp_path / "whole")
    run = stopped_run(recipe, tmp_path / "run", step=1)
    monkeypatch.setitem(verb_module.TOKENS_PER_FORWARD, "cpu", 100)
    train(recipe, run_dir=run, resume=True)
    assert fingerprint(run) == fingerprint(tmp_path / "whole")
    train(recipe, run_dir=tmp_path / "control")
    assert fingerprint(tmp_path / "control") != fingerprint(tmp_path / "whole")


def test_a_finished_run_goes_on_with_more_steps(make_recipe, lora_run, tmp_path):
    run = copied(lora_run, tmp_path / "run")
    finished = json.loads((run / "result.json").read_text(encoding="utf-8"))
    more = make_recipe(training__max_steps=finished["steps"] + 1)
    result = train(more, run_dir=run, resume=True, allow_change=True)
    assert result["steps"] == finished["steps"] + 1
    assert result["checkpoint"].endswith(f"{result['steps']:06d}")
