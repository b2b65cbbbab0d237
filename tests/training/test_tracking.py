from __future__ import annotations

import importlib.util
import logging
import threading
import time

import pytest
from PIL import Image

from vlmtune.errors import MissingExtraError
from vlmtune.training import tracking
from vlmtune.training.tracking import Backend, open_trackers
from vlmtune.training.tracking_config import TrackingConfig

KEY = "0123456789abcdef0123456789abcdef"


class Fake:
    """A service that fails or hangs where it is told to."""

    def __init__(self, fail: str = "", hang: str = "") -> None:
        self.fail, self.hang = fail, hang
        self.calls: list[tuple] = []
        self.release = threading.Event()

    def open(self, opening):
        self.opening = opening
        self._reach("open")
        return self

    def _reach(self, place: str) -> None:
        if place == self.hang:
            self.release.wait(30)
        if place == self.fail:
            raise RuntimeError(f"no\nnetwork for api key {KEY}")

    def log(self, step, values):
        self._reach("log")
        self.calls.append(("log", step, values))

    def log_images(self, step, key, images):
        self._reach("log_images")
        self.calls.append(("log_images", step, key, [caption for _, caption in images]))

    def finish(self):
        self._reach("finish")
        self.calls.append(("finish",))


@pytest.fixture
def run(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(tracking, "_OPEN_S", 0.3)
    monkeypatch.setattr(tracking, "_CLOSE_S", 0.3)
    monkeypatch.setattr(tracking, "_QUEUE", 50)
    caplog.set_level(logging.WARNING)
    fakes: list[Fake] = []

    def train(fake: Fake, other: Fake | None = None, steps: int = 4) -> list[str]:
        """Some steps under a tracker; returns the warnings."""
        fakes.extend(f for f in (fake, other) if f)
        monkeypatch.setitem(tracking.BACKENDS, "wandb", Backend("json", fake.open))
        monkeypatch.setitem(tracking.BACKENDS, "swanlab", Backend("json", (other or fake).open))
        to = ("wandb", "swanlab") if other else ("wandb",)
        trackers = open_trackers(
            TrackingConfig(to=to, project="p"),
            folder=tmp_path,
            name="run",
            hyperparameters={"rank": 8, "api_key": KEY, "tracking": {"token": KEY, "to": "wandb"}},
        )
        values = {}
        for step in range(steps):
            values["loss"] = float(step)
            trackers.log(step, values)
        trackers.log_images(steps, "Prediction", [(Image.new("RGB", (4, 4)), "said")])
        trackers.finish()
        return [record.getMessage() for record in caplog.records]

    yield train
    for fake in fakes:
        fake.release.set()


def test_everything_arrives_in_order(run):
    fake = Fake()
    assert run(fake, steps=3) == []
    assert fake.calls == [
        ("log", 0, {"loss": 0.0}),
        ("log", 1, {"loss": 1.0}),
        ("log", 2, {"loss": 2.0}),
        ("log_images", 3, "Prediction", ["said"]),
        ("finish",),
    ]
    assert (fake.opening.project, fake.opening.name) == ("p", "run")


def test_a_secret_is_no_hyperparameter(run):
    fake = Fake()
    run(fake)
    assert fake.opening.hyperparameters == {"rank": 8, "tracking": {"to": "wandb"}}


@pytest.mark.parametrize("place", ["open", "log", "log_images", "finish"])
@pytest.mark.parametrize("how", ["fail", "hang"])
def test_a_tracker_in_trouble_is_left_behind_with_one_warning(run, how, place):
    healthy = Fake()
    start = time.monotonic()
    (warning,) = run(Fake(**{how: place}), other=healthy)
    assert time.monotonic() - start < 1.5
    assert "wandb" in warning
    assert KEY not in warning
    assert "\n" not in warning
    assert [call[0] for call in healthy.calls] == ["log"] * 4 + ["log_images", "finish"]


def test_a_full_queue_costs_no_time(run):
    fake = Fake(hang="log")
    start = time.monotonic()
    (warning,) = run(fake, steps=20_000)
    assert "calls behind" in warning
    assert time.monotonic() - start < 1.5


def test_a_tracker_that_exits_the_program_does_not(run):
    fake = Fake()
    fake.log = lambda step, values: exit(3)  # noqa: ARG005
    assert len(run(fake)) == 1


@pytest.mark.parametrize("service", ["swanlab", "wandb", "tensorboard"])
def test_a_missing_package_is_an_error_before_training(service, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    config = TrackingConfig(to=(service,))
    with pytest.raises(MissingExtraError, match=rf"pip install 'vlmtune\[{service}\]'"):
        open_trackers(config, folder=tmp_path, name="run", hyperparameters={})
    assert list(tmp_path.iterdir()) == []


def test_no_tracker_is_the_default(tmp_path):
    trackers = open_trackers(TrackingConfig(), folder=tmp_path, name="run", hyperparameters={})
    trackers.log(1, {"loss": 1.0})
    trackers.finish()
    assert list(tmp_path.iterdir()) == []


def _train_for_real(service, tmp_path, caplog):
    trackers = open_trackers(
        TrackingConfig(to=(service,), project="p", name="n"),
        folder=tmp_path,
        name="run",
        hyperparameters={"rank": 8, "path": tmp_path},
    )
    for step in range(3):
        trackers.log(step, {"train/loss": 1.0 / (step + 1)})
    trackers.log_images(3, "Prediction", [(Image.new("RGB", (9, 7), "red"), "x ^ { 2 }")])
    trackers.finish()
    assert [r.getMessage() for r in caplog.records if r.name == tracking.__name__] == []
    assert any((tmp_path / "tracking").rglob("*"))


def _needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


@_needs("tensorboard")
def test_tensorboard(tmp_path, caplog):
    _train_for_real("tensorboard", tmp_path, caplog)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tracking" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (0, 1.0),
        (1, 0.5),
        (2, pytest.approx(1 / 3)),
    ]
    (image,) = events.Images("Prediction/0")
    assert (image.step, image.width, image.height) == (3, 9, 7)


@_needs("wandb")
def test_wandb_offline(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    _train_for_real("wandb", tmp_path, caplog)
    assert list((tmp_path / "tracking").rglob("Prediction*.png"))


@_needs("swanlab")
def test_swanlab_offline(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    _train_for_real("swanlab", tmp_path, caplog)
    assert list((tmp_path / "tracking").rglob("*.png"))


def test_a_missing_tracker_is_said_before_anything_long(make_recipe, tmp_path, monkeypatch):
    import importlib.util

    from vlmtune.errors import MissingExtraError
    from vlmtune.verbs import train as verb

    if importlib.util.find_spec("swanlab") is not None:
        pytest.skip("swanlab is installed here")
    monkeypatch.setattr(verb, "load_start", lambda *_, **__: pytest.fail("loaded weights first"))
    with pytest.raises(MissingExtraError, match=r"pip install 'vlmtune\[swanlab\]'"):
        verb.train(make_recipe(tracking__to=["swanlab"]), run_dir=tmp_path / "run")
