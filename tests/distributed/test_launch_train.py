"""``vlmtune train --devices`` and ``--nodes``, as a user types them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from distributed.mixed import distance, figures
from tiny_world import fingerprint, lines

VLMTUNE = Path(sys.executable).with_name("vlmtune")
WORKER = "vlmtune.cli.worker"
LONG = 40


class Command:
    """``vlmtune train RECIPE …``, on its way.

    Args:
        recipe: The recipe, written beside the run.
        run: The run's folder.
        options: Further ones.
    """

    def __init__(self, recipe: Any, run: Path, *options: object) -> None:
        file = run.with_suffix(".yaml")
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        self.run = run
        self.process = subprocess.Popen(
            [VLMTUNE, "train", file, "--run", run, "--json", *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> tuple[int, dict[str, Any], str]:
        """Exit status, result, standard error."""
        out, err = self.process.communicate(timeout=280)
        assert "Traceback" not in err, err
        return self.process.returncode, json.loads(out) if out else {}, err

    def steps(self, count: int) -> None:
        """Wait until so many steps are done."""
        path = self.run / "metrics.jsonl"
        while not path.exists() or len(lines(path)) < count:
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.05)

    def workers(self) -> list[psutil.Process]:
        """Its processes that train, the first one first."""
        children = psutil.Process(self.process.pid).children()
        assert all(WORKER in child.cmdline() for child in children)
        return sorted(children, key=lambda child: int(child.environ()["RANK"]))


def said(err: str) -> str:
    """The one paragraph of an error."""
    (message,) = [line for line in err.splitlines() if line.startswith("vlmtune: ")]
    return message.removeprefix("vlmtune: ")


@pytest.fixture(autouse=True)
def no_orphans():
    yield
    ours = {child.pid for child in psutil.Process().children(recursive=True)}
    left = [
        each for each in psutil.process_iter(["cmdline"]) if WORKER in (each.info["cmdline"] or [])
    ]
    assert [each.pid for each in left if each.pid in ours or each.ppid() == 1] == []


@pytest.fixture(scope="module")
def uninterrupted(make, tmp_path_factory):
    """Two processes, with dropout, so that each has random numbers of its own."""
    run = tmp_path_factory.mktemp("long") / "run"
    status, _, err = Command(long(make), run, "--devices", 2).wait()
    assert status == 0, err
    return fingerprint(run)


def long(make):
    tuning = {"rank": 4, "alpha": 8, "dropout": 0.2}
    return make(tuning=tuning, training__max_steps=LONG, training__save_steps=3)


def check_same(run: Path, other: Path) -> None:
    torch.testing.assert_close(figures(run), figures(other), rtol=1e-5, atol=1e-6)
    assert distance(run, other) <= 2e-5


@pytest.mark.slow
def test_two_devices(make, single, tmp_path):
    status, result, err = Command(make(), tmp_path / "run", "--devices", 2).wait()
    assert status == 0, err
    assert (result["steps"], result["run"]) == (4, str(tmp_path / "run"))
    assert err.count("writing the report") == 1
    assert "torch" not in err
    check_same(tmp_path / "run", single)


@pytest.mark.slow
def test_two_machines(make, single, tmp_path):
    """On one, as far as it can tell."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{listener.getsockname()[1]}"
    nodes = [
        Command(make(), tmp_path / "run", "--nodes", 2, "--node-rank", rank, "--rendezvous", place)
        for rank in range(2)
    ]
    ends = [node.wait() for node in nodes]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert ends[0][1]["steps"] == 4
    assert ends[1][1:] == ({}, "")
    check_same(tmp_path / "run", single)


@pytest.mark.slow
def test_an_error_of_all_is_told_once(make, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    status, result, err = Command(make(), tmp_path / "run", "--devices", 2).wait()
    assert (status, result["error"]["code"]) == (4, "run_exists")
    assert "is not empty" in said(err)


@pytest.mark.faults
@pytest.mark.parametrize("whom", ["all", "one"])
def test_a_signal_saves_and_the_run_goes_on(make, uninterrupted, tmp_path, whom):
    command = Command(long(make), tmp_path / "run", "--devices", 2)
    command.steps(2)
    struck = command.process.pid if whom == "all" else command.workers()[1].pid
    os.kill(struck, signal.SIGTERM)
    began = time.monotonic()
    status, result, err = command.wait()
    assert time.monotonic() - began < 30
    assert (status, result["error"]["code"]) == (143, "stopped")
    assert said(err).startswith("stopped by SIGTERM after step")
    status, _, err = Command(long(make), tmp_path / "run", "--devices", 2, "--resume").wait()
    assert status == 0, err
    assert fingerprint(tmp_path / "run") == uninterrupted


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_told_and_the_run_goes_on(make, uninterrupted, tmp_path, rank):
    command = Command(long(make), tmp_path / "run", "--devices", 2)
    command.steps(7)
    command.workers()[rank].kill()
    status, result, err = command.wait()
    assert (status, result["error"]["code"]) == (1, "killed")
    assert said(err).startswith(f"process {rank} was killed by SIGKILL")
    status, _, err = Command(long(make), tmp_path / "run", "--devices", 2, "--resume").wait()
    assert status == 0, err
    assert fingerprint(tmp_path / "run") == uninterrupted
