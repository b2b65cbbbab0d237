"""SwanLab and W&B against servers that refuse, hang, fail, reset and crawl: training is the same.

Needs ``swanlab`` and ``wandb``; skipped where they are absent.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tiny_world import fingerprint, lines
from trackhub import trackhub
from vlmtune.training.tracking import background
from vlmtune.training.tracking.config import TrackingConfig
from vlmtune.training.tracking.service import Shown
from vlmtune.training.tracking.trackers import open_trackers
from vlmtune.verbs import tracked
from vlmtune.verbs.train import train

pytestmark = [
    pytest.mark.faults,
    *(
        pytest.mark.skipif(
            importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
        )
        for name in ("swanlab", "wandb")
    ),
]

SERVICES = ("swanlab", "wandb")
KEYS = {"SWANLAB_API_KEY": "canaryswanlab01234567", "WANDB_API_KEY": "canarywandb" + "0a" * 15}
TROUBLES = ("refuse", "hang", "error", "reset", "slow", "bad_key")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server, with both libraries told to talk to it and logged in."""
    with trackhub() as server:
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SWANLAB_API_HOST", server.url)
        monkeypatch.setenv("SWANLAB_WEB_HOST", server.url)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        yield server


def refuse(monkeypatch):
    """Both talk to a port where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name in ("SWANLAB_API_HOST", "SWANLAB_WEB_HOST", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, nowhere)


def until(true, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def are_open(trackers):
    """Whether each one records, online or offline."""
    return all(each._records for each in trackers._trackers)


def no_key_in(folder, *texts):
    """No key is in a file below a folder, nor in what was said."""
    for key in KEYS.values():
        assert not any(key in text for text in texts)
        for file in folder.rglob("*"):
            if file.is_file():
                assert key.encode() not in file.read_bytes(), file


def test_all_of_a_run_arrives(hub, tmp_path, make_recipe, caplog):
    caplog.set_level(logging.INFO)
    recipe = make_recipe(
        evaluation={"probe": 4, "limit": 4, "max_new_tokens": 8, "metrics": ["cer"]},
        tracking={"to": SERVICES, "mode": "online"},
        training__log_steps=1,
    )
    train(recipe, run_dir=tmp_path / "run")
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    losses = [line["loss"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    sent = [
        json.loads(body)
        for path, body in hub.asked
        if path == "POST /api/house/metrics" and b'"scalar"' in body
    ]
    entries = [e for each in sent for e in each["metrics"] if e["key"] == "train/loss"]
    assert [(e["index"], e["data"]) for e in entries] == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in enumerate(losses, start=1)
    ]
    stream = b"".join(body for path, body in hub.asked if path.endswith("/file_stream"))
    for loss in losses:
        assert json.dumps(loss).encode()[:12] in stream
    for upload in ("PUT /put/media/table/", "PUT /put/media/images/"):
        assert sum(path.startswith(upload) for path, _ in hub.asked) >= 2
    pictures = [body for path, body in hub.asked if re.match(r"PUT /put/\d+$", path)]
    assert sum(body.startswith(b"\x89PNG") for body in pictures) == 8
    no_key_in(tmp_path, caplog.text)


@pytest.mark.parametrize("when", ["always", "later"])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_training_does_not_feel_a_bad_server(
    hub, tmp_path, make_recipe, lora_run, trouble, when, monkeypatch, caplog
):
    """From the start, or from the third step of the training on."""
    if when == "later" and trouble == "refuse":
        pytest.skip("a server that goes away is the one that resets")
    if trouble == "refuse":
        refuse(monkeypatch)
    elif when == "always":
        hub.trouble = trouble
    spent = spy_on_calls(monkeypatch, hub, trouble if when == "later" else None)
    monkeypatch.setattr(background, "CLOSE_S", 4.0)  # a hanging server is not waited for
    run = tmp_path / "run"
    start = time.monotonic()
    train(make_recipe(tracking={"to": SERVICES}, training__log_steps=1), run_dir=run)
    seconds = time.monotonic() - start
    assert fingerprint(run) == fingerprint(lora_run)
    assert len(lines(run / "metrics.jsonl")) == 6
    warnings = [r.getMessage() for r in caplog.records if "Tracker" in r.getMessage()]
    for service in SERVICES:
        assert sum(f"Tracker {service}" in warning for warning in warnings) <= 1
    if when == "always":
        assert len(warnings) == 2
    opening, *logging_steps = spent
    assert sum(cpu for _, cpu in logging_steps) < 0.02  # seconds that six steps spent on both
    for elapsed, _ in (opening, *logging_steps):
        assert elapsed < 2  # a call that waits for one of these servers waits for much longer
    assert seconds < 120
    no_key_in(tmp_path, caplog.text)


def spy_on_calls(monkeypatch, hub, trouble):
    """Seconds, and those of the processor, that the training itself spends in its trackers: on
    opening them, on each step. The processor's do not depend on what else the machine does.
    """
    spent = []
    opening, stepping = tracked.open_trackers, tracked.Trackers.log

    def timed(call):
        def measured(*args, **options):
            start, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **options)
            finally:
                spent.append((time.perf_counter() - start, time.thread_time() - cpu))

        return measured

    def log(self, step, values):
        if trouble is not None and step == 3:
            until(lambda: are_open(self))
            hub.trouble = trouble
        timed(stepping)(self, step, values)

    monkeypatch.setattr(tracked, "open_trackers", timed(opening))
    monkeypatch.setattr(tracked.Trackers, "log", log)
    return spent


@pytest.mark.parametrize("trouble", [*TROUBLES, None])
def test_what_a_bad_server_did_not_get_is_recorded(hub, tmp_path, trouble, monkeypatch, caplog):
    """It takes ten seconds to see that a server hangs; a longer run loses nothing."""
    monkeypatch.setattr(background, "CLOSE_S", 60.0)  # a library's first import takes its time
    if trouble == "refuse":
        refuse(monkeypatch)
    else:
        hub.trouble = trouble
    trackers = open_trackers(
        TrackingConfig(to=SERVICES), folder=tmp_path, name="run", hyperparameters={}
    )
    start = time.monotonic()
    trackers.log(1, {"train/loss": 1.0})
    trackers.show(1, [Shown(id="r", question="", truth="", prediction="said")])
    assert time.monotonic() - start < 2
    until(lambda: are_open(trackers))
    trackers.finish()
    warnings = [record.getMessage() for record in caplog.records]
    if trouble is None:
        assert warnings == []
        return
    assert len(warnings) == 2
    for service in SERVICES:
        (warning,) = (each for each in warnings if f"Tracker {service}" in each)
        assert "records offline" in warning
        assert f"{service} sync " in warning
    assert list((tmp_path / "tracking" / "swanlab").glob("run-*/*.swanlab"))
    assert list((tmp_path / "tracking" / "wandb" / "wandb").glob("offline-run-*/*.wandb"))
    no_key_in(tmp_path, caplog.text)


@pytest.mark.parametrize("when", ["always", "later"])
def test_what_is_recorded_can_be_sent(hub, tmp_path, when, monkeypatch, caplog):
    """The command of the warning, run word for word."""
    monkeypatch.setattr(background, "CLOSE_S", 8.0)
    if when == "always":
        hub.trouble = "hang"
    trackers = open_trackers(
        TrackingConfig(to=SERVICES), folder=tmp_path, name="run", hyperparameters={}
    )
    until(lambda: are_open(trackers))
    hub.trouble = "hang"
    trackers.log(1, {"train/loss": 0.123456789})
    trackers.finish()
    hub.recover()
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    for service in SERVICES:
        (warning,) = (r.getMessage() for r in caplog.records if service in r.getMessage())
        command = re.search(r"can be sent later: (.*?)\. Training goes on", warning)[1]
        hub.asked.clear()
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert any(b"0.123456789" in body for _, body in hub.asked), (command, hub.asked)


@pytest.mark.usefixtures("hub")
def test_one_thread_is_all_that_a_tracker_is_here(tmp_path):
    before = threading.active_count()
    trackers = open_trackers(
        TrackingConfig(to=SERVICES), folder=tmp_path, name="run", hyperparameters={}
    )
    assert threading.active_count() == before + len(SERVICES)
    trackers.finish()
    assert threading.active_count() == before
