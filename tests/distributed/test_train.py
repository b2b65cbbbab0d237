"""Two processes train as one does, whatever rows they get: text alone, one image, many."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from distributed.processes import together
from planted import write_dataset
from tiny_rows import asked, picture, row, turn
from tiny_world import full_recipe, lines, tiny_recipe
from vlmtune.runs.checkpoints import checkpoints
from vlmtune.verbs.train import train

STEPS = 4


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A third of the rows has no image, a third one, a third several."""
    rows = []
    for number in range(18):
        images = [picture((30 + 7 * number, 40), seed=n) for n in range((0, 1, 3)[number % 3])]
        if images:
            made = asked(f"What is number {number}?", f"It is {number}.", *images)
        else:
            made = row(turn("user", f"Say {number}."), turn("assistant", f"{number}!"))
        rows.append(type(made)(f"row-{number}", made.messages, made.images))
    return write_dataset(tmp_path_factory.mktemp("mixed") / "data", rows)


@pytest.fixture(scope="module")
def make(tiny_base, mixed):
    def recipe(**changes):
        everything = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear"}
        everything["train"] = ["vision", "projector", "language"]
        return tiny_recipe(
            tiny_base,
            mixed,
            **{
                "tuning": everything,
                "training__max_steps": STEPS,
                "training__batch_size": 6,
                "training__token_budget": 120,
                "training__learning_rate": 1e-3,
                "evaluation__probe": 0,
                **changes,
            },
        )

    return recipe


def figures(run):
    return [
        (step["loss"], step["gradient_norm"], step["labels"], step["tokens"])
        for step in lines(run / "metrics.jsonl")
    ]


def weights(run):
    return load_file(checkpoints(run / "checkpoints")[-1] / "adapter_model.safetensors")


def trained(make, run, count, **changes):
    recipe = make(**changes)
    if count == 1:
        train(recipe, run_dir=run)
        return
    results = together(count, lambda ranks: bool(train(recipe, run_dir=run)) == ranks.first)
    assert results == dict.fromkeys(range(count), True), results


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one(make, tmp_path, count):
    trained(make, tmp_path / "one", 1)
    trained(make, tmp_path / "many", count)
    torch.testing.assert_close(
        torch.tensor(figures(tmp_path / "many")),
        torch.tensor(figures(tmp_path / "one")),
        rtol=1e-5,
        atol=1e-6,
    )
    many, one = weights(tmp_path / "many"), weights(tmp_path / "one")
    assert many.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    ledgers = [
        [
            (entry["step"], entry["ids"])
            for entry in lines(tmp_path / run / "ledger.jsonl")
            if entry["event"] == "trained"
        ]
        for run in ("one", "many")
    ]
    assert ledgers[0] == ledgers[1]


def test_one_row_at_a_time_is_the_same_too(make, tmp_path):
    trained(make, tmp_path / "packed", 1)
    trained(make, tmp_path / "alone", 1, training__token_budget=1)
    torch.testing.assert_close(
        torch.tensor(figures(tmp_path / "alone")),
        torch.tensor(figures(tmp_path / "packed")),
        rtol=1e-5,
        atol=1e-6,
    )


def test_processes_that_forget_each_other_train_otherwise(make, tmp_path, monkeypatch):
    """The control: without the sum of gradients each goes its own way."""
    trained(make, tmp_path / "one", 1)
    monkeypatch.setattr("vlmtune.training.distributed.ranks.Ranks.add_gradients", lambda *_: None)
    trained(make, tmp_path / "many", 2)
    losses = [[step[0] for step in figures(tmp_path / run)] for run in ("one", "many")]
    assert abs(losses[0][-1] - losses[1][-1]) > 1e-4


@pytest.mark.slow
def test_a_run_of_two_goes_on_to_the_bit(make, tmp_path):
    """With dropout: every process has random numbers of its own, and gets them back."""
    tuning = {"rank": 4, "alpha": 8, "dropout": 0.2}
    changes = {"tuning": tuning, "training__save_steps": 2}
    trained(make, tmp_path / "whole", 2, **changes)

    def half(_):
        from vlmtune.training.saving import Saver

        class KilledError(Exception):
            """Stands for a kill after the first checkpoint."""

        original = Saver.save

        def save_and_stop(self, state):
            original(self, state)
            self.wait()
            raise KilledError

        Saver.save = save_and_stop
        with pytest.raises(KilledError):
            train(make(**changes), run_dir=tmp_path / "cut")
        return True

    assert together(2, half) == {0: True, 1: True}
    recipe = make(**changes)
    done = together(2, lambda _: train(recipe, run_dir=tmp_path / "cut", resume=True))
    assert done[1] == {}, done
    assert [step[:2] for step in figures(tmp_path / "cut")] == [
        step[:2] for step in figures(tmp_path / "whole")
    ]
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[name], tensor), name


@pytest.mark.slow
def test_full_fine_tuning_of_two_is_that_of_one(tiny_base, mixed, tmp_path):
    def recipe(**changes):
        return full_recipe(lambda **more: tiny_recipe(tiny_base, mixed, **more), **changes)

    changes = {"training__max_steps": STEPS, "evaluation__probe": 0}
    train(recipe(**changes), run_dir=tmp_path / "one")
    together(2, lambda _: train(recipe(**changes), run_dir=tmp_path / "many"))
    torch.testing.assert_close(
        torch.tensor(figures(tmp_path / "many")),
        torch.tensor(figures(tmp_path / "one")),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_finished_run_is_finished_for_all(make, tmp_path):
    trained(make, tmp_path / "run", 1, training__max_steps=1)
    recipe = make(training__max_steps=1)
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    again = together(2, lambda _: train(recipe, run_dir=tmp_path / "run", resume=True))
    assert again == {0: result, 1: {}}
