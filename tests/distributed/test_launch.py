"""Starting processes: what they say and how they end reaches who waits, and none is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from distributed.launched import MODULE, launch
from vlmtune.errors import UsageError, VlmtuneError
from vlmtune.training.distributed import launcher
from vlmtune.training.distributed.launcher import Launch, ProcessError

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_orphans(monkeypatch):
    """The processes find their module, and are gone when a test ends."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    yield
    assert alive() == []


def alive() -> list[int]:
    """Processes that run this module's acts, whoever their parent is now."""
    found = []
    for process in psutil.process_iter(["cmdline", "pid"]):
        line = process.info["cmdline"] or []
        if MODULE in line and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process.info["pid"])
    return found


def wait_until(ready, seconds=30.0):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def all_ready(folder: Path, count: int):
    return lambda: len(list(folder.glob("ready-*"))) == count


def test_what_the_first_returns(tmp_path):
    assert launch(tmp_path, ["nothing", "nothing"]) == {"processes": 2}


def test_an_error_keeps_its_status_and_is_told_once(tmp_path):
    """Of a process that waits for the others, too: what broke there is a consequence."""
    with pytest.raises(ProcessError) as caught:
        launch(tmp_path, ["follow", "refuse"])
    assert (caught.value.exit_status, caught.value.code) == (4, "refused")
    assert str(caught.value) == "the reason (process 1)"


def test_an_error_that_is_not_ours(tmp_path):
    with pytest.raises(ProcessError) as caught:
        launch(tmp_path, ["break_off", "nothing"])
    assert (caught.value.exit_status, caught.value.code) == (1, "failed")
    assert str(caught.value) == "RuntimeError: connection closed (--debug shows where)"


def test_a_killed_process_is_told_in_a_paragraph(tmp_path):
    with pytest.raises(ProcessError) as caught:
        launch(tmp_path, ["wait_for_signal", "fall"])
    assert (caught.value.exit_status, caught.value.code) == (1, "killed")
    assert str(caught.value).startswith("process 1 was killed by SIGKILL")
    assert "--resume" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("times", [1, 3])
def test_a_signal_goes_on_to_all_and_they_save(tmp_path, times):
    def strike():
        wait_until(all_ready(tmp_path, 2))
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=strike)
    thread.start()
    with pytest.raises(ProcessError) as caught:
        launch(tmp_path, ["wait_for_signal", "wait_for_signal"])
    thread.join()
    assert (caught.value.exit_status, caught.value.code) == (143, "stopped")
    assert str(caught.value).startswith("saved")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_before_anything_can_be_saved(tmp_path):
    def strike():
        wait_until(all_ready(tmp_path, 2))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=strike)
    thread.start()
    with pytest.raises(ProcessError) as caught:
        launch(tmp_path, ["sleep", "sleep"])
    thread.join()
    assert caught.value.exit_status == 130


@pytest.mark.faults
def test_processes_end_with_the_one_that_started_them(tmp_path):
    """A launcher that is killed can tell nobody."""
    command = [sys.executable, "-m", MODULE, str(tmp_path), "wait_for_signal", "wait_for_signal"]
    launcher = subprocess.Popen(command)
    try:
        wait_until(all_ready(tmp_path, 2), 60)
        assert len(alive()) == 3
    finally:
        launcher.kill()
        launcher.wait()
    wait_until(lambda: alive() == [])


@pytest.mark.parametrize("node_rank", [0, 1])
def test_machines_that_do_not_come(tmp_path, monkeypatch, node_rank):
    monkeypatch.setattr(launcher, "PATIENCE", 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(VlmtuneError, match=f"2 machines did not find each other at {place}"):
        launch(tmp_path, ["nothing"], nodes=2, node_rank=node_rank, rendezvous=place)


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (Launch(0), "--devices and --nodes: expected at least 1"),
        (Launch(1, 2), "--rendezvous: 2 nodes must find each other"),
        (Launch(1, 2, 0, "host"), "found 'host', expected HOST:PORT"),
        (Launch(1, 2, 2, "host:29500"), "--node-rank: found 2, expected 0 to 1"),
        (Launch(2, 1, -1), "--node-rank: found -1"),
    ],
)
def test_what_cannot_be_started(launch, said):
    with pytest.raises(UsageError, match=said):
        launch.check()


def test_a_process_of_a_launcher_starts_no_others(monkeypatch):
    Launch(2).check()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="started by a launcher such as torchrun"):
        Launch(2).check()
    Launch().check()
