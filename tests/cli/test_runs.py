"""``vlmtune runs`` and ``vlmtune report`` on real runs."""

from __future__ import annotations

import json
import shutil

import pytest

from report_samples import Page
from tiny_world import copied
from vlmtune.runs.folder import RunFolder
from vlmtune.training.listing import list_runs


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory, make_recipe):
    """A run of two steps, measured before and after. Copy before changing it."""
    from vlmtune.verbs.train import train

    folder = tmp_path_factory.mktemp("listed") / "measured"
    recipe = make_recipe(
        training__max_steps=2,
        evaluation={"probe": 2, "limit": 8, "max_new_tokens": 8, "metrics": ["cer", "exact_match"]},
    )
    train(recipe, run_dir=folder)
    return folder


@pytest.fixture
def folder(measured_run, lora_run, tmp_path):
    """A finished run, one that stopped, one that is damaged."""
    copied(measured_run, tmp_path / "runs" / "measured")
    stopped = RunFolder(copied(lora_run, tmp_path / "runs" / "stopped"))
    stopped.result.unlink()
    damaged = RunFolder(copied(lora_run, tmp_path / "runs" / "damaged"))
    damaged.data.write_text("{", encoding="utf-8")
    return tmp_path / "runs"


def test_all_runs_of_a_folder(command, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # ``runs`` is the default
    done = command("runs", "--html", "page.html", "--json")
    assert done.status == 0
    assert done.json["html"] == "page.html"
    found = {run["name"]: run for run in done.json["runs"]}
    assert {name: run["state"] for name, run in found.items()} == {
        "measured": "finished",
        "stopped": "stopped",
        "damaged": "damaged",
    }
    measured = found["measured"]
    result = json.loads((folder / "measured" / "result.json").read_text(encoding="utf-8"))
    assert measured["steps"] == result["steps"] == 2
    assert measured["samples"] == result["samples"]
    assert measured["metric"] == "cer"
    assert measured["after"]["value"] == result["after"]["cer"]
    assert measured["before"]["value"] == result["before"]["cer"]
    gain = measured["after"]["value"] - measured["before"]["value"]
    assert measured["difference"]["value"] == pytest.approx(gain)
    assert measured["report"].endswith("measured/report.html")
    assert found["stopped"]["steps"] == 6
    assert found["stopped"]["after"] is None
    assert "data.json" in found["damaged"]["why"]
    assert found["damaged"]["steps"] == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert (page.strangers, page.open) == ([], [])
    for name in found:
        assert name in page.text


def test_the_table_says_how_runs_stand(command, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = command("runs", folder).out
    assert "finished" in out
    assert "stopped at step 6" in out
    assert "damaged: data.json" in out
    assert "CER" in out


def test_a_comparison_that_is_out_of_date_is_not_shown(folder):
    run = RunFolder(folder / "measured")
    (fresh,) = list_runs([run.path])
    assert fresh.difference is not None
    file = run.evaluation("after") / "metrics.json"
    value = json.loads(file.read_text(encoding="utf-8"))
    value["metrics"]["cer"]["value"] += 0.01
    file.write_text(json.dumps(value), encoding="utf-8")
    (changed,) = list_runs([run.path])
    assert changed.difference is None


def test_runs_of_the_same_name_are_told_apart(lora_run, tmp_path):
    for name in ("one/run", "two/run", "other"):
        shutil.copytree(lora_run, tmp_path / name)
    names = {line.name for line in list_runs([tmp_path / "one", tmp_path / "two", tmp_path])}
    assert len(names) == 3
    assert {"one/run", "two/run"} <= {"/".join(name.split("/")[-2:]) for name in names}


def test_a_folder_without_runs_is_a_mistake(command, tmp_path):
    assert "there is no run in" in command("runs", tmp_path).message
    assert "is no folder" in command("runs", tmp_path / "nowhere").message
    assert command("runs", tmp_path).status == 2


# Report


def test_a_report_elsewhere_leaves_the_run_alone(command, folder, tmp_path):
    run = RunFolder(folder / "measured")
    run.report.unlink()
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    done = command("report", run, "--out", tmp_path / "copy.html", "--json")
    assert done.json["report"] == str(tmp_path / "copy.html")
    assert done.json["metric"] == "cer"
    assert done.json["verdict"] in ("better", "worse", "none")
    after = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    assert before == after
    assert command("report", run).status == 0
    assert run.report.read_bytes() == (tmp_path / "copy.html").read_bytes()
    assert command("report", run, "--out", tmp_path / "no" / "folder.html").status == 2


def test_slices_by_a_column(command, folder):
    run = folder / "measured"
    done = command("report", run, "--slices", "meta.source")
    assert done.status == 0
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "meta.source" in page.inside("h3")
    done = command("report", run, "--slices", "meta.kind")
    assert (done.status, "the rows have meta.source" in done.message) == (2, True)


def test_a_damaged_run_has_no_report(command, folder, tmp_path):
    done = command("report", folder / "damaged")
    assert (done.status, "data.json" in done.message) == (4, True)
    assert command("report", tmp_path).status == 2
    # Weights are no part of a report.
    shutil.rmtree(folder / "stopped" / "checkpoints")
    assert command("report", folder / "stopped").status == 0
