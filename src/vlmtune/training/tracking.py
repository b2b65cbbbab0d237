"""Trackers: a run's figures and pictures in SwanLab, Weights & Biases or TensorBoard.

A tracker is company, not part of the training: each one lives on a thread of its own behind a
bounded queue, so that one that fails, hangs or fills up is left behind with one warning while the
training goes on, unchanged. ``metrics.jsonl`` in the run folder holds everything anyway.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from PIL.Image import Image

from vlmtune.errors import MissingExtraError
from vlmtune.training.tracking_config import TrackingConfig

Captioned: TypeAlias = tuple[Image, str]

_log = logging.getLogger(__name__)

_QUEUE = 1000  # calls a tracker may lag behind
_OPEN_S = 10.0  # all trackers together may take this long to open
_CLOSE_S = 15.0  # and this long to send what is left
_SECRET_NAME = re.compile(r"key|token|secret|password|credential|authorization", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"[A-Za-z0-9_\-]{20,}")


class Tracker(Protocol):
    """What a service must be able to do."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of an optimizer step."""

    def log_images(self, step: int, key: str, images: Sequence[Captioned]) -> None:
        """Pictures with their captions under one heading."""

    def finish(self) -> None:
        """Sends what is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a service is told when a run is opened."""

    project: str
    name: str
    folder: Path
    hyperparameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Backend:
    """A service: the package it needs, which is also the name of our extra, and how to open it."""

    package: str
    open: Callable[[Opening], Tracker]


class Trackers:
    """All trackers of a run; calls return at once and never raise."""

    def __init__(self, background: Sequence[_Background]) -> None:
        self._background = background

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of an optimizer step."""
        copied = dict(values)  # the caller may go on to change it
        for each in self._background:
            each.send(lambda tracker: tracker.log(step, copied))

    def log_images(self, step: int, key: str, images: Sequence[Captioned]) -> None:
        """Pictures with their captions under one heading."""
        copied = list(images)
        for each in self._background:
            each.send(lambda tracker: tracker.log_images(step, key, copied))

    def finish(self) -> None:
        """Waits a little for what is left to be sent."""
        for each in self._background:
            each.close()
        deadline = time.monotonic() + _CLOSE_S
        for each in self._background:
            each.wait_closed(deadline)


def open_trackers(
    config: TrackingConfig, *, folder: Path, name: str, hyperparameters: Mapping[str, Any]
) -> Trackers:
    """Opens the trackers that the recipe names; call it on the first rank only.

    Args:
        config: Which, and under which names.
        folder: The run's folder; files of the trackers go to ``folder/tracking``.
        name: The run's name, unless ``config`` has one.
        hyperparameters: What is shown beside the run; entries named like secrets are left out.

    Raises:
        MissingExtraError: A service's package is not installed. Nothing else is ever raised.
    """
    for service in config.to:
        package = BACKENDS[service].package
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, package, f"tracking.to={service}")
    opening = Opening(
        project=config.project or "vlmtune",
        name=config.name or name,
        folder=folder / "tracking",
        hyperparameters=_without_secrets(hyperparameters),
    )
    background = [_Background(service, BACKENDS[service], opening) for service in config.to]
    deadline = time.monotonic() + _OPEN_S
    for each in background:
        each.wait_open(deadline)
    return Trackers(background)


class _Background:
    """One tracker on its own thread. It is given up at its first failure, with one warning."""

    def __init__(self, service: str, backend: Backend, opening: Opening) -> None:
        self._service = service
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_QUEUE)
        self._opened, self._gone = threading.Event(), threading.Event()
        self._warned = threading.Lock()
        self._thread = threading.Thread(
            target=self._work, args=(backend, opening), name=f"tracker-{service}", daemon=True
        )
        self._thread.start()

    def send(self, call: Callable[[Tracker], None]) -> None:
        if self._gone.is_set():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up(f"it is {_QUEUE} calls behind")

    def wait_open(self, deadline: float) -> None:
        if not self._opened.wait(max(0.0, deadline - time.monotonic())):
            self._give_up(f"it did not open within {_OPEN_S:g} s")

    def close(self) -> None:
        if not self._gone.is_set():
            try:
                self._calls.put_nowait(None)
            except queue.Full:
                self._give_up(f"it is {_QUEUE} calls behind")

    def wait_closed(self, deadline: float) -> None:
        if self._gone.is_set():
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._give_up(f"it did not finish within {_CLOSE_S:g} s")

    def _work(self, backend: Backend, opening: Opening) -> None:
        try:
            tracker = backend.open(opening)
            self._opened.set()
            while not self._gone.is_set():
                call = self._calls.get()
                if call is None:
                    tracker.finish()
                    return
                call(tracker)
        except BaseException as error:  # noqa: BLE001 - whatever a service does, training goes on
            self._give_up(f"{type(error).__name__}: {_SECRET_VALUE.sub('***', str(error))[:300]}")
        finally:
            self._opened.set()

    def _give_up(self, why: str) -> None:
        if self._warned.acquire(blocking=False):  # never released: one warning a tracker
            self._gone.set()
            _log.warning(
                "Tracker %s is left out from here on (%s). Training goes on; metrics.jsonl in the "
                "run folder has all figures.",
                self._service,
                " ".join(why.split()),
            )


def _without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_secrets(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if not _SECRET_NAME.search(key) or isinstance(value, Mapping | bool | int | float)
    }


# Services ----------------------------------------------------------------------------------------


class _SwanLab:
    def __init__(self, opening: Opening) -> None:
        import swanlab

        self._swanlab = swanlab
        opening.folder.mkdir(parents=True, exist_ok=True)
        self._run = swanlab.init(
            project=opening.project,
            name=opening.name,
            log_dir=str(opening.folder),
            config=opening.hyperparameters,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_images(self, step: int, key: str, images: Sequence[Captioned]) -> None:
        shown = [self._swanlab.Image(image, caption=caption) for image, caption in images]
        self._run.log({key: shown}, step=step)

    def finish(self) -> None:
        self._run.finish()


class _Wandb:
    def __init__(self, opening: Opening) -> None:
        import wandb

        self._wandb = wandb
        opening.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=opening.project,
            name=opening.name,
            dir=str(opening.folder),
            config=opening.hyperparameters,
            # No capture of our output, no copy of the code; no question on a terminal for ever.
            settings=wandb.Settings(
                console="off", disable_code=True, disable_git=True, login_timeout=_OPEN_S
            ),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_images(self, step: int, key: str, images: Sequence[Captioned]) -> None:
        shown = [self._wandb.Image(image, caption=caption) for image, caption in images]
        self._run.log({key: shown}, step=step)

    def finish(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(opening.folder / "tensorboard"))
        shown = json.dumps(opening.hyperparameters, indent=2, ensure_ascii=False, default=str)
        indented = "\n".join(f"    {line}" for line in shown.splitlines())  # Markdown's code block
        self._writer.add_text("hyperparameters", indented)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def log_images(self, step: int, key: str, images: Sequence[Captioned]) -> None:
        import numpy as np

        for number, (image, caption) in enumerate(images):
            pixels = np.array(image.convert("RGB"))  # (height, width, 3)
            self._writer.add_image(f"{key}/{number}", pixels, step, dataformats="HWC")
            self._writer.add_text(f"{key}/{number}", caption, step)

    def finish(self) -> None:
        self._writer.close()


BACKENDS: dict[str, Backend] = {
    "swanlab": Backend("swanlab", _SwanLab),
    "wandb": Backend("wandb", _Wandb),
    "tensorboard": Backend("tensorboard", _TensorBoard),
}
