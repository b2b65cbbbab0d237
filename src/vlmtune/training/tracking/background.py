"""A tracker behind a bounded queue, a thread and a process: it cannot delay or stop the training.

The training puts a call into the queue and goes on. The thread starts the tracker's process, passes
the calls on, and gives the tracker up with a warning where it fails for good.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from typing import Any

from vlmtune.training.tracking.service import Mode, Opening, Service
from vlmtune.training.tracking.worker import Finish

logger = logging.getLogger(__name__)

LOAD_S = 60.0  # a tracker's package may take this long to load; nobody waits for any of these
OPEN_S = 10.0  # and the tracker this long to open, before it is opened offline
LAST_OPEN_S = 60.0  # and this long where there is no other way
CLOSE_S = 15.0  # at the end of a run all trackers together may take this long to send what is left
EXIT_S = 3.0  # and this long to end after they have
QUEUED_BYTES = 64 * 2**20  # a tracker may lag behind by this much
TOGETHER_BYTES = 2**16  # what is passed on at once, if there is so much
LOOK_S = 0.5  # seconds between two looks for something to pass on

START = (
    "import json, sys; sys.path = json.loads(sys.argv[1]); "
    "from vlmtune.training.tracking.worker import main; main(*map(int, sys.argv[2:]))"
)
SECRET = re.compile(r"[A-Za-z0-9_\-]{20,}|(?<=://)[^/@\s]+(?=@)")


class TrackerError(Exception):
    """A tracker that cannot go on."""


class Outbox:
    """Calls on their way to a tracker, at most ``limit`` bytes of them.

    Who takes them looks now and then and is not woken: a thread that wakes takes Python's lock from
    the training, and where the machine is busy it may not run on at once to give it back.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self.dropped = 0

    def put(self, message: bytes) -> bool:
        """Add a message, or drop and count it where there is no room."""
        with self._lock:
            if self._bytes + len(message) > self._limit:
                self.dropped += 1
                return False
            self._waiting.append(message)
            self._bytes += len(message)
            return True

    def close(self) -> None:
        """Say that there will be no more messages."""
        self._closed.set()

    def get(self) -> bytes | None:
        """The next messages one behind the other, waiting for them; None after the last."""
        while not self._waiting:
            # In this order: what was put before the end is not missed.
            if self._closed.wait(LOOK_S) and not self._waiting:
                return None
        with self._lock:
            taken = [self._waiting.popleft()]
            while self._waiting and sum(map(len, taken)) < TOGETHER_BYTES:
                taken.append(self._waiting.popleft())
            self._bytes -= sum(map(len, taken))
        return b"".join(taken)


class Worker:
    """The process of a tracker, seen from here."""

    def __init__(self) -> None:
        to_read, self._calls = os.pipe()
        self._reports, to_write = os.pipe()
        self._line = b""
        numbers = map(str, (to_read, to_write, os.getpid()))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, json.dumps(sys.path), *numbers],
                stdin=subprocess.DEVNULL,  # nobody answers questions
                stdout=subprocess.DEVNULL,  # ours is the user's, and may be a line of JSON
                stderr=subprocess.DEVNULL,
                pass_fds=(to_read, to_write),
                start_new_session=True,  # Ctrl-C is for the training; and no terminal to ask on
            )
        except BaseException:
            os.close(self._calls)
            os.close(self._reports)
            raise
        finally:
            os.close(to_read)
            os.close(to_write)

    def send(self, message: bytes) -> None:
        """Pass a message on; waits where the tracker lags.

        Raises:
            TrackerError: The process has ended.
        """
        left = memoryview(message)
        try:
            while left:
                left = left[os.write(self._calls, left) :]
        except OSError as error:
            raise TrackerError(self._ended()) from error

    def report(self, seconds: float) -> dict[str, Any] | None:
        """The next report, or None if there is none within some seconds.

        Raises:
            TrackerError: The process has ended.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self._line:
            left = max(0.0, deadline - time.monotonic())
            if not _readable(self._reports, left):
                return None
            read = os.read(self._reports, 65536)
            if not read:
                raise TrackerError(self._ended())
            self._line += read
        line, _, self._line = self._line.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def wait(self, seconds: float) -> None:
        """Let the process end."""
        deadline = time.monotonic() + seconds
        while _readable(self._reports, max(0.0, deadline - time.monotonic())):
            if not os.read(self._reports, 65536):
                return

    def kill(self) -> None:
        """End the process and what it started, which may have outlived it."""
        # Not waited for before, or another process could have its number by now.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_S)

    def close(self) -> None:
        """Let go of what belongs to the process."""
        self.kill()
        os.close(self._calls)
        os.close(self._reports)

    def _ended(self) -> str:
        self.wait(EXIT_S)
        self.kill()
        return f"its process ended by itself (status {self._process.returncode})"


class Background:
    """A tracker of a run. Calls return at once and never raise.

    Args:
        name: The service's name.
        service: The service.
        opening: What it is told.
    """

    def __init__(self, name: str, service: Service, opening: Opening) -> None:
        self._name = name
        self._service = service
        self._opening = opening
        self._outbox = Outbox(QUEUED_BYTES)
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._gone = False
        self._records = False  # it has been opened, and so there is something to send later
        self._warned = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def send(self, call: bytes) -> None:
        """Queue a call, pickled."""
        if self._gone or self._outbox.put(call):
            return
        if self._outbox.dropped == 1:
            self._warn("it is too far behind: what it has no room for is dropped")

    def close(self) -> None:
        """Say that there is nothing more to come."""
        self._outbox.close()

    def wait(self, deadline: float) -> None:
        """Wait for what is left to be sent, then give it up."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            hint = self._hint() if self._records else ""
            self._give_up(f"it did not finish within {CLOSE_S:g} s", hint)
            self._thread.join(EXIT_S)  # at once: its process is no more
        if self._outbox.dropped:
            logger.info("Tracker %s missed %d calls", self._name, self._outbox.dropped)

    def _work(self) -> None:
        try:
            self._pass_on(self._opened())
        except TrackerError as error:
            self._give_up(str(error))
        except Exception as error:  # noqa: BLE001 - nothing here is worth a training
            self._give_up(f"{type(error).__name__}: {error}")
        finally:
            if self._worker is not None:
                self._worker.close()

    def _pass_on(self, worker: Worker) -> None:
        while (message := self._outbox.get()) is not None:
            worker.send(message)
            if (report := worker.report(0)) is not None:
                self._heed(report)
        worker.send(pickle.dumps(Finish()))
        while not self._heed(worker.report(CLOSE_S) or {}):
            pass  # until it is given up
        worker.wait(EXIT_S)

    def _heed(self, report: dict[str, Any]) -> bool:
        """Tell of a failed call; whether the tracker has finished."""
        if "error" in report:
            self._warn(f"it could not show everything ({_without_secrets(report['error'])})")
        return "finished" in report

    def _opened(self) -> Worker:
        """The tracker's process, opened; offline where it cannot be opened as it was asked for.

        Raises:
            TrackerError: Not even that.
        """
        modes: list[Mode | None] = [self._opening.mode]
        if "online" in self._service.modes and self._opening.mode != "offline":
            modes.append("offline")
        why = ""
        for number, mode in enumerate(modes, start=1):
            seconds = OPEN_S if number < len(modes) and mode != "local" else LAST_OPEN_S
            worker = self._start()
            report = self._outcome(worker, replace(self._opening, mode=mode), seconds)
            if "opened" in report:
                self._records = True
                self._tell(report["opened"], why)
                return worker
            why = report["failed"]
            worker.kill()
        raise TrackerError(why)

    def _outcome(self, worker: Worker, opening: Opening, seconds: float) -> dict[str, Any]:
        """What opening the tracker came to; a server is waited for ``seconds``."""
        try:
            worker.send(pickle.dumps((self._service.tracker, opening)))
            report = worker.report(LOAD_S)
            if report is None:
                return {"failed": f"its package did not load within {LOAD_S:g} s"}
            if "loaded" in report:
                report = worker.report(seconds)
        except TrackerError as error:
            return {"failed": str(error)}
        return report or {"failed": f"it did not open within {seconds:g} s"}

    def _start(self) -> Worker:
        with self._lock:
            if self._gone:
                raise TrackerError("it was given up")
            before, self._worker = self._worker, None
            if before is not None:
                before.close()
            self._worker = Worker()
            return self._worker

    def _tell(self, place: str, why: str) -> None:
        if not why:
            logger.info("Tracker %s: %s", self._name, place)
            return
        self._warn(f"it records offline ({_without_secrets(why)}){self._hint()}")

    def _hint(self) -> str:
        command = self._service.upload.format(id=self._opening.id, folder=self._opening.folder)
        return f". What is recorded can be sent later: {command}" if command else ""

    def _give_up(self, why: str, hint: str = "") -> None:
        with self._lock:
            first, self._gone = not self._gone, True
            if self._worker is not None:
                self._worker.kill()
        if first:  # its end is told again by the thread that waited for it
            self._warn(f"it is left out from here on ({_without_secrets(why)}){hint}")

    def _warn(self, what: str) -> None:
        """Warn once; what follows from it is not worth another warning."""
        with self._lock:
            level = logging.INFO if self._warned else logging.WARNING
            self._warned = True
        logger.log(
            level,
            "Tracker %s: %s. Training goes on; metrics.jsonl in the run folder has all figures",
            self._name,
            what,
        )


def _readable(descriptor: int, seconds: float) -> bool:
    """Whether there is something to read, or the end."""
    poll = select.poll()  # ``select`` takes no more than 1,024 open files
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _without_secrets(text: str) -> str:
    return SECRET.sub("***", text)[:300]
