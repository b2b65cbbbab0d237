"""The run folder: begun once, one process at a time, its files never half written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.errors import RunExistsError, UsageError
from vlmtune.files import append_lines, keep_lines_through, read_lines, write_text
from vlmtune.runs.folder import RunFolder

HOLDER = """
import sys, time
from vlmtune.runs.folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""
PARTS = {"environment": {"python": "3"}, "data": {"path": "d"}, "contract": {"format": 1}}


def begin(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    with run.lock():
        run.start("name: x\n", **PARTS)
    return run


@pytest.fixture
def holder(tmp_path):
    """Another process that works in ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_by_the_first_ones_number(holder, tmp_path):
    refusal = pytest.raises(RunExistsError, match=f"in use by process {holder.pid} on ")
    with refusal, RunFolder(tmp_path / "run").lock():
        pytest.fail("two processes hold one run")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder(tmp_path / "run").lock():  # nobody had to remove a file
        content = (tmp_path / "run/.lock").read_text(encoding="utf-8")
        assert content.startswith(f"process {os.getpid()} on ")
    with RunFolder(tmp_path / "run").lock():
        pass


def test_a_run_begins_once(tmp_path):
    run = begin(tmp_path / "run")
    assert run.exists
    names = {path.name for path in run.path.iterdir()}
    expected = {"recipe.yaml", "environment.json", "data.json", "contract.json", "checkpoints"}
    assert names == expected | {".lock"}
    with pytest.raises(RunExistsError, match="already holds a run; continue it with --resume"):
        begin(tmp_path / "run")


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(RunExistsError, match=r"not empty \(it holds thesis.tex\)"):
        begin(tmp_path)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="is a file, expected a folder"):
        begin(tmp_path / "file")


def test_checkpoints_without_a_recipe_are_not_written_over(tmp_path):
    (tmp_path / "run/checkpoints/step-000002").mkdir(parents=True)
    with pytest.raises(RunExistsError, match="it holds checkpoints"):
        begin(tmp_path / "run")


@pytest.mark.parametrize("written", range(5))
def test_a_start_that_was_killed_is_begun_again(written, tmp_path, monkeypatch):
    """Killed before each of its writes; also in the middle of one, which leaves a torn file."""
    from vlmtune import files
    from vlmtune.runs import folder

    count = 0

    def killed(path: Path, text: str) -> None:
        nonlocal count
        if count == written:
            path.with_name(f".{path.name}.4242.tmp").write_text(text[:3], encoding="utf-8")
            raise KeyboardInterrupt
        count += 1
        write_text(path, text)

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_text", killed)
        patched.setattr(folder, "write_text", killed)
        if written < 4:
            with pytest.raises(KeyboardInterrupt):
                begin(tmp_path / "run")
            assert not RunFolder(tmp_path / "run").exists
        else:
            begin(tmp_path / "run")
    if written < 4:
        begin(tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert run.exists
    assert json.loads(run.contract.read_text(encoding="utf-8")) == PARTS["contract"]
    assert list(run.path.glob(".*.tmp")) == []


def test_files_of_the_users_that_only_look_torn_stay(tmp_path):
    (tmp_path / ".notes.tmp").write_text("mine", encoding="utf-8")
    with RunFolder(tmp_path).lock():
        pass
    assert (tmp_path / ".notes.tmp").exists()


# Lines


def test_a_torn_last_line_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_lines(path, [{"step": 1}, {"step": 2}])
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 3, "lo')
    assert list(read_lines(path)) == [{"step": 1}, {"step": 2}]
    keep_lines_through(path, 1)
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n'
    append_lines(path, [{"step": 2}])
    assert list(read_lines(path)) == [{"step": 1}, {"step": 2}]


def test_a_damaged_line_in_the_middle_is_no_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1"):
        list(read_lines(path))


def test_lines_that_are_not_there_are_none(tmp_path):
    assert list(read_lines(tmp_path / "none.jsonl")) == []


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_text(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
