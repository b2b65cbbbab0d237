"""A run that looks at each image once is the run that looks at them in every epoch."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_rows import asked, encoder_of, lively, picture
from tiny_world import MakeRecipe, copied, fingerprint, lines
from vlmtune.errors import RecipeError
from vlmtune.models.generate import generate
from vlmtune.training import looking
from vlmtune.training.loop import StepReport, StoppedError
from vlmtune.verbs.looking import look_at_questions
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.train import train

TOLERANCE = 1e-5


class Stop(Observer):
    """Sends this process a signal when a step is done."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, report: StepReport) -> None:
        if report.step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where features are kept on disk; not the user's."""
    place = tmp_path_factory.mktemp("kept")
    monkeypatch.setattr(looking, "FOLDER", place)
    return place


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images in every call of a vision tower."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    seen: list[int] = []
    forward = Qwen2VisionTransformerPretrainedModel.forward

    def counted(self: Any, hidden_states: Any, grid_thw: Any, **arguments: Any) -> Any:
        seen.append(len(grid_thw))
        return forward(self, hidden_states, grid_thw, **arguments)

    monkeypatch.setattr(Qwen2VisionTransformerPretrainedModel, "forward", counted)
    return seen


def losses(run: Path) -> list[float]:
    return [step["loss"] for step in lines(run / "metrics.jsonl")]


def test_kept_in_memory_on_disk_or_not_at_all(make_recipe: MakeRecipe, tmp_path, looks, folder):
    asks = {"before": True, "after": True, "probe": 4, "max_new_tokens": 6}
    counts, prints, answers = {}, {}, {}
    for name in ("off", "memory", "disk", "again"):
        mode = "disk" if name == "again" else name
        recipe = make_recipe(training__vision_cache=mode, evaluation=asks)
        looks.clear()
        train(recipe, run_dir=tmp_path / name)
        counts[name], prints[name] = sum(looks), fingerprint(tmp_path / name)
        answers[name] = [
            lines(tmp_path / name / f"evaluation/{when}/predictions.jsonl")
            for when in ("before", "after")
        ]
    # 24 + 8 images once; one for the forecast, and some to compare, alone and in the model.
    compared = 3 * 2 * looking.SAMPLES
    assert counts["memory"] == counts["disk"] == 32 + 1 + compared
    assert counts["again"] == 1 + compared
    assert counts["off"] >= 30 + 2 * 8
    assert prints["memory"] == prints["disk"] == prints["again"]
    assert losses(tmp_path / "memory") == pytest.approx(losses(tmp_path / "off"), rel=TOLERANCE)
    assert answers["memory"] == answers["disk"] == answers["off"]
    assert len(list(folder.glob("??/*.features"))) == 32


@pytest.mark.slow  # that a resumed run goes on to the same bits, test_resume.py shows with features
def test_a_resumed_run_is_the_uninterrupted_one(make_recipe: MakeRecipe, tmp_path):
    recipe = make_recipe(training__vision_cache="memory")
    train(recipe, run_dir=tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(recipe, run_dir=tmp_path / "run", observer=Stop(3))
    other = copied(tmp_path / "run", tmp_path / "other")
    train(recipe, run_dir=tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    live = make_recipe(training__vision_cache="off")
    train(live, run_dir=other, resume=True, allow_change=True)
    assert losses(other) == pytest.approx(losses(tmp_path / "whole"), rel=TOLERANCE)


@pytest.mark.slow
def test_wrong_features_would_move_the_losses(make_recipe: MakeRecipe, tmp_path, monkeypatch):
    """The control: every image under the key of another, and nobody who compares."""
    from vlmtune.batching.vision_cache import VisionCache

    train(make_recipe(training__vision_cache="off"), run_dir=tmp_path / "off")
    find = VisionCache.find

    def other(self: Any, row: Any) -> Any:
        found = find(self, row)
        return found and {name: tensor.flip(0) for name, tensor in found.items()}

    monkeypatch.setattr(VisionCache, "find", other)
    train(make_recipe(training__vision_cache="memory"), run_dir=tmp_path / "seen")
    assert losses(tmp_path / "seen") == pytest.approx(losses(tmp_path / "off"), rel=TOLERANCE)
    monkeypatch.setattr(looking, "fault_of", lambda *_: None)
    train(make_recipe(training__vision_cache="memory"), run_dir=tmp_path / "wrong")
    assert losses(tmp_path / "wrong") != pytest.approx(losses(tmp_path / "off"), rel=TOLERANCE)


TRAINS_VISION = {
    "rank": 4,
    "alpha": 8,
    "targets": "all-linear",
    "train": ["vision", "language"],
}


def test_a_tower_that_trains_is_refused(make_recipe: MakeRecipe, tmp_path, caplog, looks):
    recipe = make_recipe(tuning=TRAINS_VISION, training__vision_cache="memory")
    with pytest.raises(RecipeError, match=r"training\.vision_cache: found memory, and the vision"):
        train(recipe, run_dir=tmp_path / "refused")
    looks.clear()
    with caplog.at_level(logging.INFO):
        train(make_recipe(tuning=TRAINS_VISION), run_dir=tmp_path / "live")
    assert "looked at every time: the vision part trains" in caplog.text
    assert sum(looks) >= 30


@pytest.mark.slow
def test_full_training_keeps_features_where_the_tower_is_frozen(make_recipe: MakeRecipe, tmp_path):
    for freeze, trains in ((["vision"], "projector"), ([], "vision")):
        tuning = {"method": "full", "freeze": freeze}
        recipe = make_recipe(tuning=tuning, training__vision_cache="memory")
        with pytest.raises(RecipeError, match=f"the {trains} part trains"):
            train(recipe, run_dir=tmp_path / trains)
    frozen = {"method": "full", "train": ["language"]}
    rate = {"training__learning_rate": 1e-3}
    for mode in ("off", "memory"):
        recipe = make_recipe(tuning=frozen, training__vision_cache=mode, **rate)
        train(recipe, run_dir=tmp_path / mode)
    assert losses(tmp_path / "memory") == pytest.approx(losses(tmp_path / "off"), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"training__max_steps": 4}, "hardly any is seen twice"),
        ({"training__vision_cache_gb": 1e-5}, "training.vision_cache_gb is 1e-05"),
    ],
    ids=["one epoch", "too small"],
)
def test_where_it_does_not_pay_or_fit(make_recipe: MakeRecipe, tmp_path, caplog, changes, reason):
    recipe = make_recipe(**changes, evaluation={"before": False, "after": False, "probe": 0})
    with caplog.at_level(logging.INFO):
        train(recipe, run_dir=tmp_path / "run")
    assert reason in caplog.text
    assert "once for all" not in caplog.text


def test_a_tower_that_drops_features_is_found(
    make_recipe: MakeRecipe, tmp_path, caplog, monkeypatch
):
    """What it makes in training is another thing each time."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

    forward = PatchMerger.forward

    def dropping(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(forward(self, x), 0.1, self.training)

    monkeypatch.setattr(PatchMerger, "forward", dropping)
    with caplog.at_level(logging.WARNING):
        train(make_recipe(training__max_steps=6), run_dir=tmp_path / "run")
    assert "differs from what the vision tower makes now" in caplog.text


def test_a_picture_with_several_questions_is_looked_at_once(tiny_base: Path, looks):
    model, encoder = lively(tiny_base), encoder_of(tiny_base)
    shown = picture((64, 48), seed=1)
    questions = [asked(f"What is number {number}?", "x", shown) for number in range(6)]
    once = look_at_questions(model, encoder, questions)
    assert once is not encoder
    looks.clear()
    known = generate(model, once, questions, max_new_tokens=4)
    assert looks == []
    assert known == generate(model, encoder, questions, max_new_tokens=4)
    assert sum(looks) == 6
    others = [asked("What?", "x", picture((64, 48), seed=number)) for number in range(6)]
    assert look_at_questions(model, encoder, others) is encoder
