"""The best checkpoint, where one was asked for, is what is measured after training, and used."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch

from distributed.processes import together
from tiny_world import MakeRecipe, full_recipe, lines
from vlmtune.cli.train import best_line, train_lines
from vlmtune.data.dataset import PreparedDataset
from vlmtune.evaluation.run import Evaluation, evaluate_rows
from vlmtune.models.load import LoadingConfig, load_model
from vlmtune.runs.resolve import open_model, resolve
from vlmtune.training import loop
from vlmtune.training.checkpoint import State
from vlmtune.training.watching import Watch
from vlmtune.verbs import train as verb
from vlmtune.verbs.measuring import Measuring
from vlmtune.verbs.train import train

LOSSES = [3.0, 2.0, 2.5, 2.6, 1.0, 0.5]  # two without a better one end it at step 4
ASKED = {
    "evaluation__every": 1,
    "evaluation__after": True,
    "evaluation__limit": 4,
    "evaluation__max_new_tokens": 8,
    "evaluation__metrics": ["edit_similarity"],
    "training__save_steps": 1,
}
EARLY = {**ASKED, "evaluation__stop_after": 2}


@pytest.fixture
def probed(monkeypatch):
    """The probe's loss after each step."""
    losses = iter(LOSSES)
    monkeypatch.setattr(loop, "mean_loss", lambda *_: next(losses))


def said_by(checkpoint, recipe):
    """What a checkpoint says when it is opened by itself."""
    opened = open_model(resolve(checkpoint), LoadingConfig(device="cpu", dtype="fp32"))
    rows = PreparedDataset.open(recipe.data.path).split("validation")[:4]
    found = evaluate_rows(opened.model, opened.encoder, rows, ["edit_similarity"], max_new_tokens=8)
    return [each.prediction for each in found.predictions]


def measured_after(run):
    found = Evaluation.read(run / "evaluation/after")
    assert found is not None
    return [each.prediction for each in found.predictions]


def require_best(run, result, recipe):
    assert (result["steps"], result["best"]["step"]) == (4, 2)
    assert result["checkpoint"] == str(run / "checkpoints/step-000002")
    best, newest = (said_by(run / f"checkpoints/step-00000{step}", recipe) for step in (2, 4))
    assert best != newest  # or the next line would say nothing
    assert measured_after(run) == best == said_by(run, recipe)


@pytest.mark.usefixtures("probed")
def test_the_best_is_measured_and_used(make_recipe: MakeRecipe, tmp_path):
    recipe = make_recipe(**EARLY)
    result = train(recipe, run_dir=tmp_path / "run")
    require_best(tmp_path / "run", result, recipe)
    told = train_lines(result)
    assert (
        "best: step 2 (probe_loss 2); it was evaluated, and is what predict, merge and serve use"
        in told
    )
    report = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "the best checkpoint, that of step 2, is what was evaluated and is used" in report


@pytest.mark.slow
@pytest.mark.usefixtures("probed")
def test_of_full_fine_tuning_too(make_recipe: MakeRecipe, tmp_path, monkeypatch):
    """By the weights: what a model of two layers says is one letter soon."""
    measured = {}

    def note(_, when, step, model, encoder):  # noqa: ARG001
        measured[when, step] = {name: each.clone() for name, each in model.state_dict().items()}

    monkeypatch.setattr(Measuring, "evaluate", note)
    train(full_recipe(make_recipe, **EARLY), run_dir=tmp_path / "run")
    ((asked, weights),) = measured.items()
    assert asked == ("after", 2)
    best, newest = (
        load_model(
            tmp_path / f"run/checkpoints/step-00000{step}", dtype=torch.float32, device="cpu"
        ).state_dict()
        for step in (2, 4)
    )
    assert best.keys() == weights.keys()
    for name, tensor in best.items():
        assert torch.equal(weights[name], tensor)
    assert any(not torch.equal(newest[name], tensor) for name, tensor in best.items())


@pytest.mark.usefixtures("probed")
def test_the_newest_is_where_nobody_asked(make_recipe: MakeRecipe, tmp_path):
    """Negative control."""
    recipe = make_recipe(**ASKED)
    result = train(recipe, run_dir=tmp_path / "run")
    assert (result["steps"], result["best"]["step"]) == (6, 6)
    assert result["checkpoint"] == str(tmp_path / "run/checkpoints/step-000006")
    assert measured_after(tmp_path / "run") == said_by(tmp_path / "run", recipe)
    assert best_line(result) is None
    assert "the best checkpoint" not in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert best_line({**result, "best": {"step": 2, "probe_loss": 2.0}}) is None


@pytest.mark.slow
@pytest.mark.usefixtures("probed")
def test_a_run_killed_before_it_was_measured(make_recipe: MakeRecipe, tmp_path, monkeypatch):
    recipe = make_recipe(**EARLY)

    def killed(*_):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(verb, "hold_checkpoint", killed)
        with pytest.raises(ZeroDivisionError):
            train(recipe, run_dir=tmp_path / "run")
    assert not (tmp_path / "run/evaluation/after").exists()
    require_best(tmp_path / "run", train(recipe, run_dir=tmp_path / "run", resume=True), recipe)


@pytest.mark.usefixtures("probed")
def test_the_trained_model_is_gone_when_the_best_is_loaded(
    make_recipe: MakeRecipe, tmp_path, monkeypatch
):
    """Both at once may not fit on the device."""
    models = []
    load, hold = verb.load_start, verb.hold_checkpoint

    def loaded(*arguments, **options):
        model = load(*arguments, **options)
        models.append(weakref.ref(model))
        return model

    def held(*arguments):
        gc.collect()
        assert models[0]() is None
        return hold(*arguments)

    monkeypatch.setattr(verb, "load_start", loaded)
    monkeypatch.setattr(verb, "hold_checkpoint", held)
    train(make_recipe(**EARLY), run_dir=tmp_path / "run")
    assert len(models) == 1


@pytest.mark.slow
# torch on outputs that are views; nothing here changes logits in place
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.usefixtures("probed")
def test_several_processes_measure_the_best_together(strategy, make_recipe: MakeRecipe, tmp_path):
    recipe = make_recipe(**EARLY, distributed={"strategy": strategy})
    results = together(2, lambda _: train(recipe, run_dir=tmp_path / "run"))
    assert isinstance(results[0], dict), results[0]  # or what was raised
    require_best(tmp_path / "run", results[0], recipe)


def test_values_of_another_metric_are_forgotten():
    """A recipe may be changed within a run, on request: an error rate is not less than a loss."""
    state = State(step=9, best_by="probe_loss", best_step=7, best_value=0.1, without_gain=5)
    watch = Watch(best_by="cer", stop_after=3)
    assert not watch.is_over(state)
    watch.judge(state, 0.5)
    assert (state.best_by, state.best_step, state.best_value) == ("cer", 9, 0.5)
    assert state.without_gain == 0
    # Negative control: of the same metric they count.
    same = State(step=9, best_by="cer", best_step=7, best_value=0.1, without_gain=5)
    assert watch.is_over(same)
    watch.judge(same, 0.5)
    assert (same.best_step, same.without_gain) == (7, 6)


@pytest.mark.usefixtures("probed")
def test_the_best_is_saved_where_no_checkpoint_was_due(make_recipe: MakeRecipe, tmp_path):
    """Named explicitly, the probe's loss is a choice like any other."""
    options = {**ASKED, "training__save_steps": 100, "training__max_steps": 4}
    recipe = make_recipe(**options, evaluation__best_metric="probe_loss")
    result = train(recipe, run_dir=tmp_path / "run")
    assert result["checkpoint"].endswith("step-000002")
    state = json.loads((tmp_path / "run/checkpoints/step-000004/state.json").read_text())
    assert (state["best_by"], state["best_step"]) == ("probe_loss", 2)
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 4
