"""How a run stands, read from its files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tiny_world import copied
from vlmtune.files import append_lines
from vlmtune.runs.checkpoints import checkpoints, faults
from vlmtune.runs.folder import LOCK, RunFolder
from vlmtune.runs.state import find_runs, looks_like_run, state_of


@pytest.fixture
def run(lora_run, tmp_path):
    return RunFolder(copied(lora_run, tmp_path / "run"))


def test_a_finished_run(run):
    state = state_of(run)
    assert (state.kind, state.step, state.checkpoint, state.words) == ("finished", 6, 6, "finished")


def test_a_stopped_run_says_where_it_goes_on(run):
    run.result.unlink()
    assert state_of(run).words == "stopped at step 6"
    shutil.rmtree(checkpoints(run.checkpoints)[-1])
    assert state_of(run).words == "stopped at step 6, goes on from 4"
    for path in checkpoints(run.checkpoints):
        shutil.rmtree(path)
    assert state_of(run).words == "stopped at step 6, goes on from 0"
    run.metrics.unlink()
    assert state_of(run).words == "stopped before its first step"


def test_a_last_line_torn_by_a_kill_is_no_damage(run):
    with run.metrics.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 7, "lo')
    assert state_of(run).kind == "finished"


def remove_recipe(run):
    run.recipe.unlink()


def break_recipe(run):
    run.recipe.write_text("a: [", encoding="utf-8")


def empty_recipe(run):
    run.recipe.write_text("", encoding="utf-8")


def remove_data(run):
    run.data.unlink()


def break_contract(run):
    run.contract.write_text("{", encoding="utf-8")


def break_result(run):
    run.result.write_bytes(b"\xff\xfe\x00")


def break_metrics(run):
    run.metrics.write_text('{"step": 1}\nno json\n{"step": 2}\n', encoding="utf-8")


def break_a_step(run):
    append_lines(run.metrics, [{"step": "seven"}])


def break_evaluation(run):
    run.evaluation("after").mkdir(parents=True)


def cut_weights(run):
    file = checkpoints(run.checkpoints)[-1] / "adapter_model.safetensors"
    os.truncate(file, 10)


def remove_manifest(run):
    (checkpoints(run.checkpoints)[-1] / "manifest.json").unlink()


def remove_checkpoints(run):
    shutil.rmtree(run.checkpoints)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove_recipe, "recipe.yaml is missing"),
        (break_recipe, "recipe.yaml: "),
        (empty_recipe, "recipe.yaml holds no options"),
        (remove_data, "data.json: missing"),
        (break_contract, "contract.json: "),
        (break_result, "result.json: "),
        (break_metrics, "metrics.jsonl: "),
        (break_a_step, "metrics.jsonl: a step is no number"),
        (break_evaluation, "evaluation/after/metrics.json: missing"),
        (cut_weights, "step-000006: adapter_model.safetensors: 10 bytes, "),
        (remove_manifest, "step-000006: manifest.json: damaged"),
        (remove_checkpoints, "checkpoints: there is none"),
    ],
)
def test_damage_is_named(run, damage, said):
    assert state_of(run).kind != "damaged"
    damage(run)
    state = state_of(run)
    assert (state.kind, state.why[: len(said)]) == ("damaged", said)
    assert looks_like_run(run.path)  # it is listed all the same


def test_sizes_are_looked_at_and_contents_are_not(run):
    newest = checkpoints(run.checkpoints)[-1]
    file = newest / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert faults(newest)
    assert faults(newest, hashed=False) == []


HOLDER = """
import sys, time
from vlmtune.runs.folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_that_a_process_holds_is_running(run):
    run.result.unlink()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert state_of(run).words == "running, at step 6"
        break_contract(run)  # may be in the middle of being written
        assert state_of(run).kind == "running"
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert (run.path / LOCK).read_text(encoding="utf-8").startswith(f"process {holder.pid} on ")
    assert state_of(run).kind == "damaged"


def test_looking_does_not_hold_a_run(run):
    """Whoever starts while another looks must not be turned away."""
    state_of(run)
    with run.lock():
        pass
    assert json.loads(run.result.read_text(encoding="utf-8"))["steps"] == 6


def test_runs_are_found_below_a_folder(run, tmp_path):
    for name in ("sweep/a", "sweep/b", "one/two/three/deep", ".hidden/run"):
        shutil.copytree(run.path, tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "sweep")
    (tmp_path / "recipe-alone").mkdir()
    (tmp_path / "recipe-alone" / "recipe.yaml").write_text("name: x", encoding="utf-8")
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)]
    assert found == ["run", "sweep/a", "sweep/b"]
    assert list(find_runs(run.path)) == [run.path]
    assert list(find_runs(tmp_path / "one")) == [tmp_path / "one/two/three/deep"]
