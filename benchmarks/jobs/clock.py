"""Seconds of the phases of one job, and the losses of its steps. Needs nothing that is installed.

A job is a script that runs in an environment of its own: it reads ``job.json`` and writes
``measured.json`` beside it. Wall seconds say what somebody waits; processor seconds of a job of one
thread hardly depend on who else keeps the machine busy.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOAD = "start_load"  # all that is neither preparing rows nor training


class Clock:
    """Which phase each second of the process belongs to."""

    def __init__(self) -> None:
        self.job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        self.folder = Path(sys.argv[1]).parent
        self.losses: list[float] = []
        self.labels = 0
        self.facts: dict[str, Any] = {}  # what else a job says
        self._seconds: dict[str, list[float]] = {}
        self._phase = LOAD
        # The interpreter started before us: its processor seconds count, its wall seconds are
        # added by whoever started it.
        self._wall, self._processor = time.perf_counter(), 0.0

    def switch(self, phase: str) -> str:
        """From now on it is ``phase``; returns what it was."""
        wall, processor = time.perf_counter(), time.process_time()
        spent = self._seconds.setdefault(self._phase, [0.0, 0.0])
        spent[0] += wall - self._wall
        spent[1] += processor - self._processor
        self._wall, self._processor = wall, processor
        before, self._phase = self._phase, phase
        return before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase within another."""
        before = self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time counted as a phase."""

        def inner(*arguments: Any, **named: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **named)

        return inner

    def watch_trainer(self) -> None:
        """Time transformers' Trainer, and note each step's loss before it is rounded for a log."""
        from transformers import Trainer

        train, step = Trainer.train, Trainer.training_step
        clock = self

        def stepped(trainer: Any, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            clock.labels += int((inputs["labels"] != -100).sum())
            loss = step(trainer, model, inputs, *more, **named)
            number = trainer.state.global_step
            if len(clock.losses) <= number:
                clock.losses.append(0.0)
            clock.losses[number] += float(loss)
            return loss

        Trainer.training_step = stepped
        Trainer.train = self.timed("train", train)

    def write(self, *packages: str) -> None:
        """Write what was measured, with the versions of these packages."""
        self.switch(LOAD)
        measured = {
            "seconds": {name: round(spent[0], 4) for name, spent in self._seconds.items()},
            "processor": {name: round(spent[1], 4) for name, spent in self._seconds.items()},
            "losses": self.losses,
            "labels": self.labels,
            **self.facts,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", *packages)},
        }
        (self.folder / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


def know_torchvision() -> None:
    """Let an ordinary torchvision be imported beside a CPU build of torch.

    The wheel's own operators are compiled for CUDA; the two that are named at import are declared,
    and nobody calls them.
    """
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)


def know_no_sound() -> None:
    """Stand in for torchaudio, whose wheel is compiled for CUDA; no row of ours has sound."""
    import types
    from importlib.machinery import ModuleSpec

    module = types.ModuleType("torchaudio")
    module.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = module


KEPT: list[Any] = []  # a library that is collected takes its operators along
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
