"""A tracker's own process: takes calls from the run's process, and tells how it fares.

A service may hang, take the output over, ask questions, leave handlers for the end of the program
or end it: here, none of that is the training's. Nothing but what the service needs is loaded.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import IO, Any

from vlmtune.training.tracking.service import Opening, Shown, Tracker

NICE = 10  # the training comes first
LEFT_S = 60  # an orphan may take this long to send what it has
LOOK_S = 2.0


@dataclass(frozen=True, slots=True)
class Log:
    """Figures of an optimizer step."""

    step: int
    values: Mapping[str, float]

    def perform(self, tracker: Tracker) -> None:
        """Do it."""
        tracker.log(self.step, self.values)


@dataclass(frozen=True, slots=True)
class Show:
    """The table of predictions at a step."""

    step: int
    rows: Sequence[Shown]

    def perform(self, tracker: Tracker) -> None:
        """Do it."""
        tracker.show(self.step, self.rows)


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing comes after this."""

    def perform(self, tracker: Tracker) -> None:
        """Do it."""
        tracker.finish()


Call = Log | Show | Finish


def main(calls: int, reports: int, parent: int) -> None:
    """Open a tracker and do what is asked until there is nothing more.

    Args:
        calls: Descriptor to read from: ``module:class`` of the tracker, its ``Opening``, calls.
        reports: Descriptor to write to: lines of JSON, each with one of ``loaded`` (the service's
            package is; nothing has been asked of a server), ``opened`` (the place where the run can
            be looked at), ``failed`` (to open), ``error`` (the first call that failed),
            ``finished``.
        parent: The run's process.
    """
    os.nice(NICE)
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the training, which then tells us
        signal.signal(number, signal.SIG_IGN)
    sys.argv = ["vlmtune"]  # services write down how the program was called
    for descriptor in (calls, reports):
        os.set_inheritable(descriptor, False)  # what a service starts would keep them open
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    with os.fdopen(calls, "rb") as stream, os.fdopen(reports, "w", encoding="utf-8") as answers:
        _serve(stream, answers)


def _serve(stream: IO[bytes], answers: IO[str]) -> None:
    def report(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    name, opening = pickle.load(stream)
    try:
        kind = tracker_class(name)
        report(loaded=True)
        tracker = kind(opening)
    except BaseException as error:  # noqa: BLE001 - whatever a service raises, it is told
        report(failed=described(error))
        return
    report(opened=tracker.place)
    call: Call | None = None
    well = True
    while not isinstance(call, Finish):
        try:
            call = pickle.load(stream)
        except EOFError:  # the run's process is no more
            call = Finish()
        try:
            call.perform(tracker)
        except BaseException as error:  # noqa: BLE001
            if well:  # no more: nobody reads them while a call is on its way to us
                report(error=described(error))
            well = False
    report(finished=True)


def tracker_class(name: str) -> Callable[[Opening], Tracker]:
    """The class that ``module:class`` names, which opens a tracker."""
    module, _, kind = name.partition(":")
    found: Callable[[Opening], Tracker] = vars(import_module(module))[kind]
    return found


def described(error: BaseException) -> str:
    """An error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _leave_with(parent: int) -> None:
    """End this process, whatever it is doing, some time after the one that started it."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    time.sleep(LEFT_S)
    os._exit(1)
