"""Measuring on the way: answers to the probe, the best step by any metric, and an early end."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from distributed.processes import together
from tiny_world import MakeRecipe, fingerprint, lines
from vlmtune.errors import DataError, RecipeError, UsageError
from vlmtune.evaluation.run import Evaluation, Prediction, scored
from vlmtune.runs.checkpoints import checkpoints
from vlmtune.training import loop
from vlmtune.training.checkpoint import State
from vlmtune.training.watching import Watch
from vlmtune.verbs import measuring
from vlmtune.verbs.train import train

QUICK = {"evaluation__max_new_tokens": 3, "evaluation__metrics": ["edit_similarity", "cer"]}


def judged(watch: Watch, values: Iterable[float]) -> State:
    state = State()
    for value in values:
        state.step += 10
        watch.judge(state, value)
        if watch.is_over(state):
            break
    return state


@pytest.mark.parametrize(
    ("rising", "values", "best", "ends"),
    [
        (False, [3.0, 2.0, 2.5, 2.0, 1.0], (20, 2.0), 40),  # as good is no better
        (True, [0.1, 0.3, 0.2, 0.4, 0.1], (40, 0.4), 50),
        (False, [float("nan"), 2.0, float("nan"), float("inf"), 1.0], (20, 2.0), 40),
        (True, [0.5, 0.1, 0.2], (10, 0.5), 30),
    ],
)
def test_two_measurements_without_a_better_one(rising, values, best, ends):
    state = judged(Watch(rising=rising, stop_after=2), values)
    assert (state.best_step, state.best_value) == best
    assert state.step == ends
    # Negative control: not asked to, it never ends.
    assert judged(Watch(rising=rising), values).step == 10 * len(values)


def test_the_probe_is_answered_every_few_steps(make_recipe: MakeRecipe, lora_run, tmp_path):
    """Each time with the metrics, and the training goes on to the same bits."""
    recipe = make_recipe(evaluation__generate_every=2, **QUICK)
    result = train(recipe, run_dir=tmp_path / "run")
    records = lines(tmp_path / "run/metrics.jsonl")
    asked = {each["step"]: each["probe_metrics"] for each in records if "probe_metrics" in each}
    assert asked.keys() == {2, 4, 6}
    for step, values in asked.items():
        stored = Evaluation.read(tmp_path / f"run/evaluation/step-{step:06d}")
        assert stored is not None
        assert values == {name: each.value for name, each in stored.metrics.items()}
        assert len(stored.predictions) == 4  # the probe's rows
    assert fingerprint(tmp_path / "run") == fingerprint(lora_run)
    assert result["best"].keys() == {"step", "probe_loss"}


def test_asking_that_drew_a_number_would_be_seen(
    make_recipe: MakeRecipe, lora_run, tmp_path, monkeypatch
):
    """Negative control of the equal bits: the adapters have dropout."""
    evaluate = measuring.evaluate_rows

    def drawing(*arguments, **options):
        torch.rand(1)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(measuring, "evaluate_rows", drawing)
    train(make_recipe(evaluation__generate_every=2, **QUICK), run_dir=tmp_path / "run")
    assert fingerprint(tmp_path / "run")["files"] != fingerprint(lora_run)["files"]


def probe_losses(monkeypatch: pytest.MonkeyPatch, values: Iterable[float]) -> None:
    losses = iter(values)
    monkeypatch.setattr(loop, "mean_loss", lambda *_: next(losses))


EARLY = {
    "evaluation__every": 1,
    "evaluation__stop_after": 2,
    "training__save_steps": 100,
    "training__keep": 1,
}


def test_training_ends_where_nothing_is_gained(
    make_recipe: MakeRecipe, tmp_path, monkeypatch, caplog
):
    probe_losses(monkeypatch, [3.0, 2.0, 2.5, 2.6, 1.0, 0.5])
    result = train(make_recipe(**EARLY), run_dir=tmp_path / "run")
    assert result["steps"] == 4
    assert result["best"] == {"step": 2, "probe_loss": 2.0}
    # The best is saved, though no checkpoint was due there, and stays beside the last.
    saved = [path.name for path in checkpoints(tmp_path / "run/checkpoints")]
    assert saved == ["step-000002", "step-000004"]
    (event,) = [
        each for each in lines(tmp_path / "run/ledger.jsonl") if each["event"] == "stopped_early"
    ]
    assert event == {"step": 4, "event": "stopped_early", "best_step": 2, "probe_loss": 2.0}
    assert "the training ends at step 4 of 6 (evaluation.stop_after)" in caplog.text


def test_training_goes_on_where_something_is_gained(make_recipe: MakeRecipe, tmp_path, monkeypatch):
    """Negative control."""
    probe_losses(monkeypatch, [3.0, 2.0, 2.5, 1.9, 2.0, 1.8])
    assert train(make_recipe(**EARLY), run_dir=tmp_path / "run")["steps"] == 6


@pytest.mark.parametrize("lost", [0, 2])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    lost, make_recipe: MakeRecipe, tmp_path, monkeypatch
):
    losses = [3.0, 2.0, 2.5, 2.6, 1.0, 0.5]
    recipe = make_recipe(**{**EARLY, "training__save_steps": 1, "training__keep": 9})
    probe_losses(monkeypatch, losses)
    train(recipe, run_dir=tmp_path / "run")
    whole = fingerprint(tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    for path in checkpoints(tmp_path / "run/checkpoints")[4 - lost :]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    probe_losses(monkeypatch, losses[4 - lost :])
    assert train(recipe, run_dir=tmp_path / "run", resume=True)["steps"] == 4
    assert fingerprint(tmp_path / "run") == whole


def answers(monkeypatch: pytest.MonkeyPatch, right: Iterable[int]) -> None:
    """The probe's answers: so many of four letters are right, each time it is asked."""
    asked = iter(right)

    def say(*arguments, **_):
        said = "abcd"[: next(asked)]
        row = Prediction("1", "?", said, ("abcd",), True, 1, 1, {})
        return scored([row], metrics=arguments[3], max_new_tokens=9)

    monkeypatch.setattr(measuring, "evaluate_rows", say)


def test_the_best_checkpoint_is_best_by_the_metric_that_was_named(
    make_recipe: MakeRecipe, tmp_path, monkeypatch
):
    options = {**QUICK, "training__save_steps": 100, "training__keep": 1}
    recipe = make_recipe(
        evaluation__generate_every=1, evaluation__best_metric="edit_similarity", **options
    )
    answers(monkeypatch, [1, 2, 4, 3, 2, 1])
    probe_losses(monkeypatch, itertools.repeat(1.0))
    result = train(recipe, run_dir=tmp_path / "up")
    assert result["best"] == {"step": 3, "edit_similarity": 1.0}
    saved = [path.name for path in checkpoints(tmp_path / "up/checkpoints")]
    assert saved == ["step-000003", "step-000006"]
    # Of errors, fewer are better.
    falling = make_recipe(evaluation__generate_every=1, evaluation__best_metric="cer", **options)
    answers(monkeypatch, [1, 2, 0, 3, 2, 1])
    result = train(falling, run_dir=tmp_path / "down")
    assert result["best"] == {"step": 4, "cer": 0.25}


def test_evaluations_of_steps_that_come_again_are_forgotten(
    make_recipe: MakeRecipe, tmp_path, monkeypatch
):
    recipe = make_recipe(evaluation__generate_every=2, **QUICK)
    train(recipe, run_dir=tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    last = tmp_path / "run/checkpoints/step-000006"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    seen = []
    monkeypatch.setattr(
        loop,
        "_train_step",
        lambda *_: seen.extend(sorted(folder.name for folder in steps())) or 1 / 0,
    )

    def steps() -> list[Path]:
        return list((tmp_path / "run/evaluation").glob("step-*"))

    with pytest.raises(ZeroDivisionError):
        train(recipe, run_dir=tmp_path / "run", resume=True)
    assert seen == ["step-000002", "step-000004"]


def test_two_processes_ask_and_end_together(make_recipe: MakeRecipe, tmp_path):
    recipe = make_recipe(
        evaluation__generate_every=1,
        evaluation__best_metric="cer",
        evaluation__stop_after=1,
        training__batch_size=4,
        training__learning_rate=1e-9,  # nothing is gained after the first step
        **QUICK,
    )
    results = together(2, lambda _: train(recipe, run_dir=tmp_path / "run"))
    assert (results[0]["steps"], results[0]["best"]["step"], results[1]) == (2, 1, {})
    saved = [path.name for path in checkpoints(tmp_path / "run/checkpoints")]
    assert saved == ["step-000001", "step-000002"]
    stored = Evaluation.read(tmp_path / "run/evaluation/step-000002")
    assert stored is not None
    assert len(stored.predictions) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"best_metric": "bleu"}, "best_metric: bleu is not measured during training"),
        ({"best_metric": "anls", "generate_every": 5}, "found 'anls', expected probe_loss or one"),
        ({"stop_after": 3, "probe": 0}, "probe: 0 rows cannot say which step is best"),
        ({"stop_after": 0}, "evaluation.stop_after"),
    ],
)
def test_options_that_do_not_meet(options, said, make_recipe: MakeRecipe):
    with pytest.raises(RecipeError, match=said):
        make_recipe(evaluation=options)


def test_a_metric_that_the_probe_cannot_have_is_told_before_the_first_step(
    make_recipe: MakeRecipe, tmp_path
):
    recipe = make_recipe(evaluation__generate_every=6, evaluation__metrics=["box_iou"])
    with pytest.raises((UsageError, DataError), match="compares boxes"):
        train(recipe, run_dir=tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists() or not checkpoints(
        tmp_path / "run/checkpoints"
    )
