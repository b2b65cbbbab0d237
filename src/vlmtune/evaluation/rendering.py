"""Formulas as ink, drawn in a process of its own.

What a model says may be anything: nested a thousand deep, a mile wide, or slow to draw. The process
has bounds of time and memory and may die of a formula, which then counts as one that cannot be
drawn. It is a fresh interpreter, which ends when its connection does.
"""

from __future__ import annotations

import atexit
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

Ink = NDArray[np.bool_]  # (height, width), cropped: no outer row or column is empty

PROCESSOR_SECONDS = 2.0  # of one formula; a usual one takes a hundredth
WALL_SECONDS = 30.0  # after which the process is taken to hang
START_SECONDS = 120.0
MEMORY_BYTES = 4 * 2**30
WIDEST = 4096  # pixels; some 300 letters in a line
REMEMBERED = 1 << 16  # formulas; a truth is drawn once for all its predictions
_SIZE = struct.Struct(">II")


def ink(latex: str) -> Ink | None:
    """A formula's ink, or None if it cannot be drawn."""
    packed = _drawn(latex.strip())
    if packed is None:
        return None
    height, width = _SIZE.unpack_from(packed)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8, offset=_SIZE.size), count=height * width)
    return bits.reshape(height, width).astype(np.bool_)


class Drawer:
    """The process, started when it is first needed and again after it was lost."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def draw(self, latex: str) -> bytes | None:
        """Size and packed bits of a formula's ink, or None."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._stop()  # it died of nothing that it was asked to draw
            connection = self._connection or self._start()
            try:
                connection.send_bytes(latex.encode(errors="replace"))
                if connection.poll(WALL_SECONDS):
                    return connection.recv_bytes() or None
            except (EOFError, OSError):  # it died of the formula
                pass
            self._stop()
            return None

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """Leave the process to the program that this one was forked from."""
        self._lock = threading.Lock()  # a thread that held it is not here
        if self._process is not None:
            self._process.returncode = 0  # not ours to wait for
        self._connection = self._process = None

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        handle = theirs.fileno()
        # -P: nothing is imported from the working folder that this program would not find there.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from vlmtune.evaluation.rendering import main; main({handle})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], pass_fds=[handle], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._connection = ours
        if not ours.poll(START_SECONDS) or ours.recv_bytes() != b"ready":
            self._stop()
            raise RuntimeError("the process that draws formulas for render_match did not start")
        return ours

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._connection = self._process = None


_DRAWER = Drawer()
atexit.register(_DRAWER.close)
os.register_at_fork(after_in_child=_DRAWER.forget)


@lru_cache(REMEMBERED)
def _drawn(latex: str) -> bytes | None:
    return _DRAWER.draw(latex)


# In the process ----------------------------------------------------------------------------------


class _SlowError(Exception):
    """A formula took too long."""


def main(handle: int) -> None:
    """Draw formulas until the connection ends."""
    from vlmtune.formulas import render

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides when to stop
    _bound_memory()
    with Connection(handle) as connection:
        connection.send_bytes(b"ready")
        while True:
            try:
                latex = connection.recv_bytes().decode()
            except EOFError:
                return
            try:
                with _bounded():
                    packed = _packed(np.asarray(render(latex, padding=0)) < 128)
            except Exception:  # noqa: BLE001 - however a formula fails, it cannot be drawn
                packed = b""
            connection.send_bytes(packed)


def _packed(ink: Ink) -> bytes:
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if not len(rows) or columns[-1] - columns[0] >= WIDEST:
        return b""
    cropped = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _SIZE.pack(*cropped.shape) + np.packbits(cropped).tobytes()


@contextmanager
def _bounded() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _SlowError

    # Processor time, so that a busy machine does not decide what can be drawn.
    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, PROCESSOR_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _bound_memory() -> None:
    if sys.platform == "linux":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, most))
