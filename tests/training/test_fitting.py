"""Memory ends: the budget halves and the same step is done again; its result stays."""

from __future__ import annotations

import logging
import os
import signal

import pytest
import torch

from tiny_world import MakeRecipe, fingerprint, lines
from vlmtune.training import fitting, loop
from vlmtune.training.distributed.strategy import Strategy
from vlmtune.training.fitting import TooLargeError, budgets
from vlmtune.training.loop import StoppedError
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.train import train

PLAIN = {"tuning__dropout": 0.0}


def little_memory(monkeypatch, tokens, where="forward", since=1):
    """No forward (or backward) with more tokens fits, from a step on; counts the attempts."""
    seen = []
    summed, backward, step = loop.summed_loss, Strategy.backward, loop._train_step
    now = {"step": 0, "tokens": 0}

    def full():
        return now["step"] >= since and now["tokens"] > tokens

    def train_step(job, number, *rest):
        now["step"] = number.number
        return step(job, number, *rest)

    def forward(model, family, batch):
        seen.append((now["step"], batch.tokens))
        now["tokens"] = batch.tokens
        loss = summed(model, family, batch)
        if where == "forward" and full():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return loss

    def back(self, loss):
        backward(self, loss)  # gradients of the pack that did not fit are there already
        if where == "backward" and full():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(loop, "_train_step", train_step)
    monkeypatch.setattr(loop, "summed_loss", forward)
    monkeypatch.setattr(Strategy, "backward", back)
    return seen


class Stop(Observer):
    def __init__(self, after):
        self.after = after

    def step(self, report):
        if report.step == self.after:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped_run(recipe, folder, step):
    with pytest.raises(StoppedError):
        train(recipe, run_dir=folder, observer=Stop(step))
    return folder


def losses(run):
    return [(step["loss"], step["gradient_norm"]) for step in lines(run / "metrics.jsonl")]


def close(found, expected, limit=1e-6):
    return all(
        one == pytest.approx(other, rel=limit)
        for pair in zip(found, expected, strict=True)
        for one, other in zip(*pair, strict=True)
    )


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_same_step_is_done_again(make_recipe: MakeRecipe, tmp_path, monkeypatch, caplog, where):
    recipe = make_recipe(**PLAIN, training__max_steps=3)
    train(recipe, run_dir=tmp_path / "whole")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        seen = little_memory(patch, 200, where, since=2)
        train(recipe, run_dir=tmp_path / "run")
    assert any(tokens > 200 for _, tokens in seen)
    assert close(losses(tmp_path / "run"), losses(tmp_path / "whole"))
    assert len([each for each in caplog.records if "memory ended" in each.message]) == 1
    events = lines(tmp_path / "run/ledger.jsonl")
    (event,) = [each for each in events if each["event"] == "token_budget"]
    assert event["step"] == 2
    assert event["token_budget"] <= event["before"] // 2
    ids = [each["ids"] for each in events if each["event"] == "trained"]
    whole = lines(tmp_path / "whole/ledger.jsonl")
    assert ids == [each["ids"] for each in whole if each["event"] == "trained"]


def test_gradients_that_stay_are_noticed(make_recipe: MakeRecipe, tmp_path, monkeypatch):
    """The control: what the failed attempt left behind must go."""
    recipe = make_recipe(**PLAIN, training__max_steps=2)
    train(recipe, run_dir=tmp_path / "whole")
    little_memory(monkeypatch, 200, "backward")
    attempt = fitting.attempt

    def forgetful(work, strategy):
        kept = strategy.optimizer.zero_grad
        strategy.optimizer.zero_grad = lambda **_: None
        try:
            return attempt(work, strategy)
        finally:
            strategy.optimizer.zero_grad = kept

    monkeypatch.setattr(loop, "attempt", forgetful)
    train(recipe, run_dir=tmp_path / "run")
    assert not close(losses(tmp_path / "run"), losses(tmp_path / "whole"), 1e-3)


def test_a_resumed_run_cuts_as_the_run_that_memory_cut(
    make_recipe: MakeRecipe, tmp_path, monkeypatch
):
    """With dropout: bit for bit, packs and random numbers included. Memory is plenty later on."""
    recipe = make_recipe()
    with monkeypatch.context() as patch:
        little_memory(patch, 200, since=2)
        train(recipe, run_dir=tmp_path / "whole")
        run = stopped_run(recipe, tmp_path / "run", step=3)
    train(recipe, run_dir=run, resume=True)
    assert fingerprint(run) == fingerprint(tmp_path / "whole")
    monkeypatch.setattr("vlmtune.verbs.train.token_budgets_of", lambda _: (256, 256))  # the control
    other = tmp_path / "other"
    with monkeypatch.context() as patch:
        little_memory(patch, 200, since=2)
        stopped_run(recipe, other, step=3)
    train(recipe, run_dir=other, resume=True)
    assert fingerprint(other)["files"] != fingerprint(tmp_path / "whole")["files"]


def test_a_row_that_does_not_fit_alone(make_recipe: MakeRecipe, tmp_path, monkeypatch):
    weights = []
    monkeypatch.setattr(Strategy, "move", lambda self, *_, **__: weights.append(self) or 0.0)
    little_memory(monkeypatch, 10)
    with pytest.raises(TooLargeError, match=r"row \S+ \(\d+ tokens\).*Lower image.max_pixels"):
        train(make_recipe(), run_dir=tmp_path / "run")
    assert weights == []  # nothing was moved


def test_processes_that_go_in_step_say_so():
    class Parts(Strategy):
        in_step = True

    class Two:
        rank, count = 1, 2

    strategy = Parts.__new__(Parts)
    strategy.ranks = Two()

    def work():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TooLargeError, match=r"process 1.*training\.token_budget"):
        fitting.attempt(work, strategy)


@pytest.mark.parametrize(
    ("stated", "stored", "expected"),
    [
        (None, None, (1024, 1024)),
        (300, None, (300, 300)),
        (None, (128, 256), (128, 256)),
        (256, (128, 256), (128, 256)),
        (512, (128, 256), (512, 512)),  # asked for something else, which --allow-change permits
    ],
)
def test_which_budget_holds(stated, stored, expected):
    assert budgets(stated, 1024, stored) == expected


# The rehearsal


def test_a_rehearsal_changes_nothing(make_recipe: MakeRecipe, tmp_path, monkeypatch):
    """With dropout, whose random numbers it draws; not a bit differs."""
    train(make_recipe(), run_dir=tmp_path / "without")
    seen = little_memory(monkeypatch, 10**9)
    train(make_recipe(training__rehearse=True), run_dir=tmp_path / "with")
    number, tokens = seen[0]
    assert (number, tokens) == (0, max(each for _, each in seen))
    assert fingerprint(tmp_path / "with") == fingerprint(tmp_path / "without")


def test_a_rehearsal_that_draws_is_noticed(make_recipe: MakeRecipe, tmp_path, monkeypatch):
    """The control."""
    train(make_recipe(), run_dir=tmp_path / "without")
    monkeypatch.setattr(fitting.RandomStates, "restore", lambda _: None)
    train(make_recipe(training__rehearse=True), run_dir=tmp_path / "with")
    assert fingerprint(tmp_path / "with") != fingerprint(tmp_path / "without")


def test_a_rehearsal_finds_what_does_not_fit(make_recipe: MakeRecipe, tmp_path, monkeypatch):
    train(make_recipe(**PLAIN), run_dir=tmp_path / "whole")
    little_memory(monkeypatch, 200, since=0)
    train(make_recipe(**PLAIN, training__rehearse=True), run_dir=tmp_path / "run")
    events = lines(tmp_path / "run/ledger.jsonl")
    assert events[0]["event"] == "token_budget"
    assert events[0]["step"] == 0
    assert sum(each["event"] == "token_budget" for each in events) == 1
    assert close(losses(tmp_path / "run"), losses(tmp_path / "whole"), 1e-5)
