"""A tracker is company: whatever one does, the training hears of it once and goes on."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from PIL import Image

from fake_trackers import KEY
from vlmtune.errors import RecipeError
from vlmtune.recipe import recipe_from
from vlmtune.training.tracking import background
from vlmtune.training.tracking.config import TrackingConfig
from vlmtune.training.tracking.service import SERVICES, Service, Shown
from vlmtune.training.tracking.trackers import open_trackers, without_secrets

ALL_MODES = ("online", "offline", "local")


def png(size=(9, 7), colour="red"):
    encoded = io.BytesIO()
    Image.new("RGB", size, colour).save(encoded, "PNG")
    return encoded.getvalue()


ROW = Shown(id="row-1", question="what?", truth="x ^ { 2 }", prediction="x ^ { 3 }", picture=png())


@pytest.fixture
def tracked(monkeypatch, tmp_path, caplog):
    """Some steps under fake trackers, as many as named; returns the warnings."""
    monkeypatch.setattr(background, "OPEN_S", 30.0)
    monkeypatch.setattr(background, "CLOSE_S", 30.0)
    monkeypatch.setattr(background, "EXIT_S", 0.3)
    caplog.set_level(logging.WARNING)

    def run(*kinds, steps=4, **options):
        names = tuple(SERVICES)[: len(kinds)]
        for name, kind in zip(names, kinds, strict=True):
            fake = Service(
                package="json",
                tracker=f"fake_trackers:{kind}",
                modes=("online", "offline", "local"),
                upload="send {id} {folder}",
            )
            monkeypatch.setitem(SERVICES, name, fake)
        trackers = open_trackers(
            TrackingConfig(to=names, project="p", **options),
            folder=tmp_path,
            name="run",
            hyperparameters={"rank": 8, "api_key": KEY, "tracking": {"token": KEY, "to": "wandb"}},
        )
        values = {}
        for step in range(steps):
            values["loss"] = float(step)  # the same mapping each time
            trackers.log(step, values)
        trackers.show(steps, [ROW])
        trackers.finish()
        return [record.getMessage() for record in caplog.records]

    return run


def calls(folder, name="swanlab"):
    path = folder / "tracking" / name / "calls.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def test_everything_arrives_in_order(tracked, tmp_path):
    assert tracked("Healthy", steps=3, workspace="team") == []
    opened, *rest = calls(tmp_path)
    assert rest == [
        {"call": "log", "step": 0, "values": {"loss": 0.0}},
        {"call": "log", "step": 1, "values": {"loss": 1.0}},
        {"call": "log", "step": 2, "values": {"loss": 2.0}},
        {"call": "show", "step": 3, "captions": ["x ^ { 3 }"]},
        {"call": "finish"},
    ]
    assert (opened["project"], opened["name"], opened["workspace"]) == ("p", "run", "team")
    assert not opened["resumed"]


def test_a_resumed_run_is_the_same_run_there(tracked, tmp_path):
    tracked("Healthy", "Healthy", steps=1)
    tracked("Healthy", steps=1)
    first, second = (call for call in calls(tmp_path) if call["call"] == "open")
    assert first["id"] == second["id"] != calls(tmp_path, "wandb")[0]["id"]
    assert (first["resumed"], second["resumed"]) == (False, True)


def test_a_table_is_shown_once_at_a_step(tmp_path, monkeypatch):
    healthy = Service(package="json", tracker="fake_trackers:Healthy", modes=())
    monkeypatch.setitem(SERVICES, "swanlab", healthy)
    trackers = open_trackers(
        TrackingConfig(to=("swanlab",)), folder=tmp_path, name="run", hyperparameters={}
    )
    other = replace(ROW, prediction="y")
    for step, row in ((2, ROW), (4, ROW), (2, ROW), (2, other)):  # 2 was the best one
        trackers.show(step, [row])
    trackers.finish()
    shown = [(each["step"], *each["captions"]) for each in calls(tmp_path) if "captions" in each]
    assert shown == [(2, "x ^ { 3 }"), (4, "x ^ { 3 }"), (2, "y")]


def test_a_secret_is_no_hyperparameter(tracked, tmp_path):
    tracked("Healthy", steps=0)
    assert calls(tmp_path)[0]["hyperparameters"] == {"rank": 8, "tracking": {"to": "wandb"}}


def test_only_secrets_are_left_out():
    kept = {
        "token_budget": 256,
        "max_new_tokens": None,
        "image_token": 7,
        "prompt": "What is the token?",
        "key": "a",
        "paths": ["a", {"b": (1, 2.0)}],
    }
    shown = without_secrets({**kept, "hf_token": KEY, "url": "https://me:pass@host/x"})
    assert shown == {**kept, "paths": ["a", {"b": [1, 2.0]}], "url": "https://***@host/x"}


@pytest.mark.parametrize("how", ["Fails", "Hangs", "Exits", "Dies"])
def test_a_tracker_in_trouble_costs_one_warning(tracked, how, monkeypatch):
    """At each of its calls one of them does what it should not."""
    if how == "Hangs":
        monkeypatch.setattr(background, "CLOSE_S", 0.5)
    start = time.monotonic()
    warnings = tracked(*(f"{how}_{place}" for place in ("open", "log", "show", "finish")))
    assert time.monotonic() - start < 5
    assert sorted(warning.split()[1] for warning in warnings) == sorted(f"{s}:" for s in SERVICES)
    for warning in warnings:
        assert KEY not in warning
        assert "\n" not in warning


def test_a_tracker_does_not_feel_another(tracked, tmp_path):
    assert len(tracked("Healthy", "Dies_open", "Dies_log")) == 2
    told = [call["call"] for call in calls(tmp_path)]
    assert told == ["open", *["log"] * 4, "show", "finish"]


def test_a_call_that_fails_is_not_the_last(tracked, tmp_path):
    (warning,) = tracked("Fails_log", steps=2000)  # more than a pipe holds
    assert "could not show everything (RuntimeError: no network" in warning
    told = [call["call"] for call in calls(tmp_path)]
    assert told == ["open", *["log"] * 2000, "show", "finish"]


@pytest.mark.parametrize("mode", [None, "online"])
def test_what_cannot_be_reached_is_recorded_for_later(tracked, tmp_path, mode, monkeypatch):
    monkeypatch.setattr(background, "OPEN_S", 0.2)
    warnings = tracked("OnlyOffline", "HangsOnline", mode=mode)
    for name in ("swanlab", "wandb"):
        told = calls(tmp_path, name)
        assert [call["mode"] for call in told if call["call"] == "open"] == [mode, "offline"]
        assert [call["call"] for call in told[-2:]] == ["show", "finish"]
        (warning,) = (warning for warning in warnings if f" {name}: " in warning)
        assert "records offline" in warning
        assert f"send {told[0]['id']} {tmp_path / 'tracking' / name}" in warning


@pytest.mark.slow
@pytest.mark.parametrize(("loads", "opens"), [(3, 0), (0, 3)])
def test_a_package_that_loads_slowly_is_no_server_that_hangs(
    loads, opens, tmp_path, monkeypatch, caplog
):
    """On a busy machine a library's import takes longer than a server may."""
    monkeypatch.setattr(background, "OPEN_S", 2.0)
    (tmp_path / "loading.py").write_text(
        f"import time, fake_trackers\ntime.sleep({loads})\n"
        "class Slow(fake_trackers.Healthy):\n"
        f"    def trouble(self, call):\n        time.sleep({opens} if call == 'open' else 0)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    slow = Service(package="json", tracker="loading:Slow", modes=("online", "offline"))
    monkeypatch.setitem(SERVICES, "swanlab", slow)
    config = TrackingConfig(to=("swanlab",), mode="online")
    open_trackers(config, folder=tmp_path, name="run", hyperparameters={}).finish()
    modes = [call["mode"] for call in calls(tmp_path) if call["call"] == "open"]
    assert modes == (["online"] if loads else ["online", "offline"])
    assert len(caplog.records) == len(modes) - 1


def test_nothing_is_tried_that_was_not_asked_for(tracked, tmp_path):
    (warning,) = tracked("Fails_open", mode="offline")
    assert "left out" in warning
    assert [call["mode"] for call in calls(tmp_path)] == ["offline"]


def test_nobody_waits_for_a_tracker(tracked, monkeypatch):
    monkeypatch.setattr(background, "CLOSE_S", 0.2)
    start = time.monotonic()
    (warning,) = tracked("Hangs_log", steps=20_000)
    assert "did not finish" in warning
    assert time.monotonic() - start < 2  # 20,000 calls among it


def test_what_does_not_fit_is_dropped_and_counted(tracked, monkeypatch, caplog):
    monkeypatch.setattr(background, "CLOSE_S", 0.2)
    monkeypatch.setattr(background, "QUEUED_BYTES", 20_000)
    caplog.set_level(logging.INFO)
    messages = tracked("Hangs_log", steps=3000)
    assert sum("too far behind" in message for message in messages) == 1
    (missed,) = (message for message in messages if " missed " in message)
    assert 1000 < int(missed.split()[3]) < 3000


def test_an_outbox_keeps_the_order_and_its_limit():
    box = background.Outbox(10)
    assert [box.put(b"1234"), box.put(b"5678"), box.put(b"9012"), box.put(b"34")] == [
        True,
        True,
        False,
        True,
    ]
    assert (box.get(), box.dropped) == (b"1234567834", 1)
    assert box.put(b"9012")
    box.close()
    assert [box.get(), box.get()] == [b"9012", None]


def test_what_is_passed_on_at_once_is_bounded(monkeypatch):
    monkeypatch.setattr(background, "TOGETHER_BYTES", 6)
    box = background.Outbox(100)
    for message in (b"1234", b"5678", b"9012"):
        box.put(message)
    box.close()
    assert [box.get(), box.get(), box.get()] == [b"12345678", b"9012", None]


@pytest.fixture
def typed():
    """Somebody has typed ahead."""
    kept = os.dup(0)
    read, write = os.pipe()
    os.write(write, b"an answer\n")
    os.dup2(read, 0)
    yield
    os.dup2(kept, 0)
    for descriptor in (kept, read, write):
        os.close(descriptor)


@pytest.mark.usefixtures("typed")
def test_a_tracker_has_neither_our_output_nor_a_terminal(tracked, tmp_path, capfd):
    start = time.monotonic()
    assert tracked("Rude") == []
    assert time.monotonic() - start < 10  # and its handler at exit is not waited for
    assert capfd.readouterr() == ("", "")
    (asked,) = (call for call in calls(tmp_path) if call["call"] == "asked")
    assert (asked["answer"], asked["terminal"]) == (None, False)


def test_nothing_is_left_running(tracked, monkeypatch):
    monkeypatch.setattr(background, "CLOSE_S", 0.2)
    before = set(psutil.Process().children())
    tracked("Hangs_log", "Hangs_open")
    assert set(psutil.Process().children()) <= before


@pytest.mark.faults
def test_a_killed_run_takes_its_trackers_with_it(tmp_path):
    program = f"""
import time
from pathlib import Path
from vlmtune.training.tracking.config import TrackingConfig
from vlmtune.training.tracking.service import SERVICES, Service
from vlmtune.training.tracking.trackers import open_trackers
fake = Service(package="json", tracker="fake_trackers:Healthy", modes=("offline",))
SERVICES["swanlab"] = fake
trackers = open_trackers(
    TrackingConfig(to=("swanlab",)), folder=Path({str(tmp_path)!r}), name="r", hyperparameters={{}}
)
trackers.log(1, {{"loss": 1.0}})
time.sleep(60)
"""
    start = f"import sys; sys.path = {sys.path!r}\n{program}"
    process = subprocess.Popen([sys.executable, "-c", start])
    try:
        _until(lambda: len(calls(tmp_path)) == 2)
        (tracker,) = psutil.Process(process.pid).children()
        tracker.send_signal(signal.SIGTERM)  # as a scheduler sends to all; the run decides
        tracker.send_signal(signal.SIGINT)
    finally:
        process.kill()
        process.wait()
    _until(lambda: calls(tmp_path)[-1]["call"] == "finish")
    _until(lambda: not tracker.is_running())


def _until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("service", SERVICES)
def test_a_missing_package_is_one_warning(service, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    trackers = open_trackers(
        TrackingConfig(to=(service,)), folder=tmp_path, name="run", hyperparameters={}
    )
    assert not trackers
    (record,) = caplog.records
    assert f"pip install 'vlmtune[{service}]'" in record.getMessage()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_left_behind_is_no_package(tmp_path, monkeypatch, caplog):
    """W&B makes ``wandb`` where it runs, which Python takes for a package."""
    monkeypatch.setitem(SERVICES, "wandb", Service(package="left_here", tracker="", modes=()))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "left_here").mkdir()
    assert importlib.util.find_spec("left_here") is not None
    assert not open_trackers(
        TrackingConfig(to=("wandb",)), folder=tmp_path, name="run", hyperparameters={}
    )
    assert len(caplog.records) == 1


def test_no_tracker_is_the_default(tmp_path):
    trackers = open_trackers(TrackingConfig(), folder=tmp_path, name="run", hyperparameters={})
    trackers.log(1, {"loss": 1.0})
    trackers.finish()
    assert list(tmp_path.iterdir()) == []


def test_figures_that_are_none_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(
        SERVICES, "swanlab", Service(package="json", tracker="fake_trackers:Healthy", modes=())
    )
    trackers = open_trackers(
        TrackingConfig(to=("swanlab",)), folder=tmp_path, name="run", hyperparameters={}
    )
    trackers.log(1, {"loss": float("nan"), "norm": float("inf"), "rate": 0.5})
    trackers.finish()
    assert calls(tmp_path)[1]["values"] == {"rate": 0.5}


def _recipe(**tracking):
    return recipe_from({"name": "x", "model": {"base": "b"}, "tracking": tracking})


@pytest.mark.parametrize(
    ("service", "mode"),
    [("wandb", "local"), ("tensorboard", "online"), ("trackio", "online")],
)
def test_a_mode_that_a_service_does_not_know(service, mode):
    with pytest.raises(RecipeError, match=rf"tracking\.mode: {service} knows .*, not {mode}"):
        _recipe(to=["swanlab", service], mode=mode)


@pytest.mark.parametrize("service", SERVICES)
def test_modes_that_are_known(service):
    for mode in (None, *SERVICES[service].modes):
        assert _recipe(to=[service], mode=mode).tracking.mode == mode


def test_the_folder_cannot_be_used(tmp_path, caplog):
    (tmp_path / "tracking").write_text("a file", encoding="utf-8")
    assert not open_trackers(
        TrackingConfig(to=("tensorboard",)), folder=tmp_path, name="r", hyperparameters={}
    )
    assert len(caplog.records) == 1


def test_the_environment_reaches_the_tracker(tracked, tmp_path, monkeypatch):
    """Keys are the libraries' business: they read them where they always do."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracked("Healthy", steps=0)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY not in file.read_text(encoding="utf-8")
    assert os.environ["WANDB_API_KEY"] == KEY
