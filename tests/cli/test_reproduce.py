"""``vlmtune reproduce``: a run made again, and what it says where it is not the same."""

from __future__ import annotations

import json
import shutil

import pytest

from tiny_world import copied, lines
from vlmtune.cli.reproduce import WORDS
from vlmtune.evaluation.intervals import Difference
from vlmtune.files import append_lines, write_json
from vlmtune.runs.folder import RunFolder
from vlmtune.verbs.reproduce import (
    _changed_environment,
    _detours,
    _outcome,
    compare_runs,
    stored_recipe,
)
from vlmtune.verbs.train import train


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory, make_recipe):
    """A run of two steps, measured before and after. Copy before changing it."""
    folder = tmp_path_factory.mktemp("reproduce") / "once"
    recipe = make_recipe(
        training__max_steps=2,
        evaluation={"probe": 2, "limit": 4, "max_new_tokens": 8, "metrics": ["cer", "exact_match"]},
    )
    train(recipe, run_dir=folder)
    return folder


def test_a_run_made_again_is_the_same_to_the_bit(command, measured_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where things lie is taken from what was recorded
    run = copied(measured_run, tmp_path / "once")
    done = command("reproduce", run, "--json")
    assert done.status == 0
    assert done.json["outcome"] == "identical"
    assert done.json["differs"] == []
    assert done.json["steps"] == {"identical": 2, "of": 2}
    assert done.json["run"] == f"{run}-again"
    for found in done.json["metrics"].values():
        assert found["first"] == found["again"]
        assert found["difference"]["changed"] == 0
    again = RunFolder(done.json["run"])
    assert again.report.exists()
    # Negative controls: other weights, other answers.
    changed_weights(again)
    assert compare_runs(RunFolder(run), again)["outcome"] == "equal"
    changed_answers(again, 1)
    assert compare_runs(RunFolder(run), again)["outcome"] == "indistinguishable"


def changed_weights(run):
    manifest = next(run.checkpoints.glob("step-000002/manifest.json"))
    value = json.loads(manifest.read_text(encoding="utf-8"))
    value["files"]["adapter_model.safetensors"]["sha256"] = "0" * 64
    write_json(manifest, value)


def changed_answers(run, number):
    file = run.evaluation("after") / "predictions.jsonl"
    records = lines(file)
    for record in records[:number]:
        record["prediction"] = record["references"][0]
    file.unlink()
    append_lines(file, records)


def test_what_differs_is_said(measured_run, tmp_path):
    run = RunFolder(copied(measured_run, tmp_path / "once"))
    assert list(_changed_environment(run)) == []
    environment = json.loads(run.environment.read_text(encoding="utf-8"))
    environment["packages"]["torch"] = "2.0.0"
    write_json(run.environment, environment)
    (line,) = _changed_environment(run)
    assert line.startswith("packages.torch: was 2.0.0, is now 2.")
    assert list(_detours(run)) == []
    append_lines(run.ledger, [{"event": "changed", "changes": ["training.epochs: 1 is now 2"]}])
    assert list(_detours(run)) == [
        "the run itself was changed on its way: training.epochs: 1 is now 2"
    ]


def test_other_data_and_another_base_are_refused(command, measured_run, tmp_path):
    run = RunFolder(copied(measured_run, tmp_path / "once"))
    data = json.loads(run.data.read_text(encoding="utf-8"))
    contract = json.loads(run.contract.read_text(encoding="utf-8"))
    write_json(run.data, {**data, "fingerprint": "f" * 64})
    done = command("reproduce", run)
    assert (done.status, "data: the fingerprint was ffff" in done.message) == (4, True)
    assert "--allow-change" in done.message
    write_json(run.data, data)
    write_json(run.contract, {**contract, "base": {**contract["base"], "weights_sha256": "0" * 64}})
    done = command("reproduce", run)
    assert (done.status, "does not hold the weights" in done.message) == (4, True)
    assert not list(tmp_path.glob("once-again*"))


def test_only_what_does_not_change_the_result_may_be_overridden(command, measured_run, tmp_path):
    done = command("reproduce", measured_run, "training.learning_rate=1")
    assert done.status == 2
    assert "training.learning_rate: with another value it would be another run" in done.message
    moved = tmp_path / "moved"
    recorded = json.loads((measured_run / "data.json").read_text(encoding="utf-8"))
    shutil.copytree(recorded["path"], moved)
    recipe = stored_recipe(RunFolder(measured_run), [f"data.path={moved}", "training.workers=1"])
    assert (recipe.data.path, recipe.training.workers) == (str(moved), 1)
    kept = stored_recipe(RunFolder(measured_run))
    assert kept.data.path == recorded["path"]
    assert kept.training == recipe.training.model_copy(update={"workers": 0})


def test_what_is_no_run_cannot_be_reproduced(command, measured_run, tmp_path):
    assert command("reproduce", tmp_path).status == 2
    assert command("reproduce", measured_run, "--run", measured_run).status == 2
    run = copied(measured_run, tmp_path / "once")
    (run / "contract.json").write_text("{", encoding="utf-8")
    done = command("reproduce", run)
    assert (done.status, "contract.json" in done.message) == (4, True)


CHANGED, CLAIMED = Difference(0.1, -0.1, 0.3, 0.8, 9), Difference(0.1, 0.05, 0.3, 1.0, 9)
SAME = Difference(0.0, 0.0, 0.0, 0.5, 0)


@pytest.mark.parametrize(
    ("same_weights", "changes", "outcome"),
    [
        (True, {"cer": SAME}, "identical"),
        (False, {"cer": SAME}, "equal"),
        (False, {"cer": SAME, "bleu": CHANGED}, "indistinguishable"),
        (False, {"cer": CHANGED, "bleu": CLAIMED}, "different"),
        (True, {"cer": CLAIMED}, "different"),  # other rows, or another way of asking
        (True, None, "identical"),
        (False, None, "not measured"),
    ],
)
def test_outcomes(same_weights, changes, outcome):
    assert _outcome(same_weights, changes) == outcome
    assert outcome in WORDS
