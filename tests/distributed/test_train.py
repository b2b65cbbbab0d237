"""Two processes train as one does, whatever rows they get: text alone, one image, many."""

from __future__ import annotations

import json

import pytest
import torch

from distributed.mixed import distance, figures, trained, weights
from distributed.processes import together
from tiny_world import lines
from vlmtune.verbs.train import train


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one(make, single, tmp_path, count):
    many = trained(make(), tmp_path / "many", count)
    torch.testing.assert_close(figures(many), figures(single), rtol=1e-5, atol=1e-6)
    assert distance(many, single) <= 2e-5
    ledgers = [
        [
            (entry["step"], entry["ids"])
            for entry in lines(run / "ledger.jsonl")
            if entry["event"] == "trained"
        ]
        for run in (single, many)
    ]
    assert ledgers[0] == ledgers[1]


def test_one_row_at_a_time_is_the_same_too(make, single, tmp_path):
    alone = trained(make(training__token_budget=1), tmp_path / "alone")
    torch.testing.assert_close(figures(alone), figures(single), rtol=1e-5, atol=1e-6)


def test_processes_that_forget_each_other_train_otherwise(make, single, tmp_path, monkeypatch):
    """The control: without the sum of gradients each goes its own way."""
    monkeypatch.setattr("vlmtune.training.distributed.ranks.Ranks.add_gradients", lambda *_: None)
    many = trained(make(), tmp_path / "many", 2)
    assert abs(figures(single)[-1, 0] - figures(many)[-1, 0]) > 1e-4


@pytest.mark.slow
def test_a_run_of_two_goes_on_to_the_bit(make, tmp_path):
    """With dropout: every process has random numbers of its own, and gets them back."""
    tuning = {"rank": 4, "alpha": 8, "dropout": 0.2}
    recipe = make(tuning=tuning, training__save_steps=2)
    whole = trained(recipe, tmp_path / "whole", 2)
    trained(recipe, tmp_path / "cut", 2, cut=True)
    cut = trained(recipe, tmp_path / "cut", 2)
    assert torch.equal(figures(cut), figures(whole))
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(cut)[name], tensor), name


def test_a_finished_run_is_finished_for_all(make, tmp_path):
    recipe = make(training__max_steps=1)
    trained(recipe, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    again = together(2, lambda _: train(recipe, run_dir=tmp_path / "run", resume=True))
    assert again == {0: result, 1: {}}
