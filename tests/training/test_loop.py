"""The loop: cut into forwards or not it is the same step; a step that is not finite is left out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.errors import DivergedError
from vlmtune.files import read_lines
from vlmtune.formulas import write_formula_table
from vlmtune.recipe import load_recipe
from vlmtune.testing import tiny
from vlmtune.training import loop
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    table = write_formula_table(folder / "formulas", 20, seed=3)
    prepare(table, folder / "data", PrepareOptions(validation=4))
    return tiny("qwen2_vl", folder / "base"), folder / "data"


def run(world, out, *options, observer=None, **keywords):
    base, data = world
    recipe = load_recipe(
        "latex-ocr",
        [
            f"model.base={base}",
            f"data.path={data}",
            "training.precision=fp32",
            "training.gradient_checkpointing=false",
            "training.max_steps=3",
            "training.batch_size=8",
            "training.workers=0",
            "evaluation.before=false",
            "evaluation.after=false",
            *options,
        ],
    )
    return train(recipe, run_dir=out, observer=observer or Observer(), **keywords)


def losses(folder):
    return [record["loss"] for record in read_lines(folder / "metrics.jsonl")]


def norms(folder):
    return [record["gradient_norm"] for record in read_lines(folder / "metrics.jsonl")]


def test_cut_into_forwards_does_not_change_a_step(world, tmp_path):
    """One pack of 8 rows = packs of one row each = gradient checkpointing, without dropout."""
    plain = ["tuning.dropout=0.0"]
    run(world, tmp_path / "packed", *plain, "training.token_budget=100000")
    run(world, tmp_path / "alone", *plain, "training.token_budget=1")
    run(world, tmp_path / "ahead", *plain, "training.workers=3")
    run(world, tmp_path / "checkpointing", *plain, "training.gradient_checkpointing=true")
    for other in ("alone", "ahead", "checkpointing"):
        assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / "packed"), rel=1e-5)
        assert norms(tmp_path / other) == pytest.approx(norms(tmp_path / "packed"), rel=1e-4)
    assert losses(tmp_path / "packed")[0] != losses(tmp_path / "packed")[1]


def test_mean_of_means_would_be_another_loss(world, tmp_path, monkeypatch):
    """Negative control: normalising each forward by its own labels changes the result."""
    run(world, tmp_path / "right", "tuning.dropout=0.0", "training.token_budget=200")
    summed = loop.summed_loss

    def mean(model, family, batch):
        return summed(model, family, batch) / batch.labels * 30

    monkeypatch.setattr(loop, "summed_loss", mean)
    run(world, tmp_path / "wrong", "tuning.dropout=0.0", "training.token_budget=200")
    ratio = [
        a / b for a, b in zip(losses(tmp_path / "wrong"), losses(tmp_path / "right"), strict=True)
    ]
    assert max(ratio) / min(ratio) > 1 + 1e-3


def test_every_row_is_in_the_ledger(world, tmp_path):
    run(world, tmp_path / "run", "training.max_steps=null", "training.epochs=2")
    dataset = PreparedDataset.open(world[1])
    trained = [
        identity
        for record in read_lines(tmp_path / "run" / "ledger.jsonl")
        if record["event"] == "trained"
        for identity in record["ids"]
    ]
    assert sorted(trained) == sorted(dataset.split("train").ids * 2)


def test_too_long_rows_are_left_out_and_accounted_for(world, tmp_path):
    from vlmtune.runs.folder import RunFolder
    from vlmtune.training.summary import account

    run(world, tmp_path / "all", "training.max_steps=1")
    (step,) = read_lines(tmp_path / "all" / "metrics.jsonl")
    middling = f"data.max_length={step['tokens'] // step['samples']}"
    run(world, tmp_path / "run", "training.max_steps=null", middling)
    found = account(RunFolder(tmp_path / "run"))
    dropped = found["dropped"]["too_long"]
    assert 0 < dropped < 16
    assert found["in"] == found["trained"] + found["validation"] + dropped == 20
    with pytest.raises(Exception, match="too long"):
        run(world, tmp_path / "strict", middling, "data.too_long=error")


def poison(monkeypatch, steps):
    """Make the loss of some steps infinite."""
    summed, calls = loop.summed_loss, {"step": 0}
    step = loop._train_step

    def train_step(job, number, batches, started):
        calls["step"] = number.number
        return step(job, number, batches, started)

    def loss(model, family, batch):
        value = summed(model, family, batch)
        return value * math.inf if calls["step"] in steps else value

    monkeypatch.setattr(loop, "_train_step", train_step)
    monkeypatch.setattr(loop, "summed_loss", loss)


def test_a_step_that_is_not_finite_is_not_applied(world, tmp_path, monkeypatch):
    weights = []

    class Watch(Observer):
        def step(self, report):
            weights.append((report.applied, report.step))

    poison(monkeypatch, {2})
    run(world, tmp_path / "run", observer=Watch())
    assert weights == [(True, 1), (False, 2), (True, 3)]
    events = [record["event"] for record in read_lines(tmp_path / "run" / "ledger.jsonl")]
    assert events == ["trained", "trainability", "skipped_step", "trained"]
    assert "loss" not in list(read_lines(tmp_path / "run" / "metrics.jsonl"))[1]


def test_three_in_a_row_stop_the_run_with_good_weights(world, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3, 4})
    with pytest.raises(DivergedError, match="not finite in 3 steps"):
        run(world, tmp_path / "run", "training.max_steps=30", "training.save_steps=1")
    from safetensors.torch import load_file

    from vlmtune.runs.checkpoints import newest_good

    newest = newest_good(tmp_path / "run" / "checkpoints")
    tensors = load_file(newest / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_fp16_overflow_skips_and_lowers_the_scale(world, tmp_path, monkeypatch):
    """The scaler works on a CPU as on a GPU: too large a scale overflows and is halved.

    Four steps in a row and more are left out here, and that is no divergence.
    """
    from vlmtune.verbs import holding

    def huge(config, device):
        assert config.precision == "fp16"
        return torch.amp.GradScaler(device.type, init_scale=2.0**40, growth_interval=1000)

    monkeypatch.setattr(holding, "make_scaler", huge)
    run(
        world,
        tmp_path / "run",
        "training.precision=fp16",
        "training.max_steps=30",
        "training.batch_size=1",
        "evaluation.probe=0",
    )
    applied = [record["applied"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert not any(applied[:4])
    assert applied[-1], "once the scale fits, steps are applied"


def test_probe_leaves_training_as_it_was(world, tmp_path):
    run(world, tmp_path / "without", "evaluation.probe=0")
    run(world, tmp_path / "with", "evaluation.probe=4", "evaluation.every=1")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert all("probe_loss" in record for record in read_lines(tmp_path / "with" / "metrics.jsonl"))


def test_report_of_a_step_is_immutable():
    report = loop.StepReport(1, 2, 0.5, 1e-4, 1.0, True, 8, 100, 50, 0.1, 0)
    assert replace(report, probe_loss=0.4).probe_loss == 0.4
    with pytest.raises(AttributeError):
        report.loss = 1.0
