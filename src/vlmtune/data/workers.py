"""Processes that work on portions of rows; what they give comes in the rows' order.

A worker is a fresh interpreter that runs ``main`` and nothing of the user's program, so that a
script may call ``prepare`` at its top level, and threads of the caller do no harm. It ends when its
connection does: none outlives the process that started it, however that one ends.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, cycle
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple, Self, TypeAlias

from vlmtune.data.records import Record
from vlmtune.data.work import Portion, Result, RowWork, Task, portions
from vlmtune.errors import VlmtuneError

# What is done this soon is done sooner than processes start.
SECONDS_ALONE = 1.0
# One that is worked on, one that waits: a worker need not wait for the others' turn.
PORTIONS_EACH = 2
DEFAULT_WORKERS = 4


class WorkerDiedError(VlmtuneError):
    """A worker ended before its work did."""

    code = "worker_died"


class _Defect(NamedTuple):
    """An exception of a worker that is none of the user's faults."""

    trace: str


Worked: TypeAlias = tuple[Sequence[Record], Result]


def worked(
    task: Task, records: Iterable[Record], workers: int | None
) -> Generator[Worked, None, None]:
    """All rows, worked on, in their order: some records with what became of each.

    Args:
        task: What is to be done.
        records: The rows.
        workers: Processes; 1: this one alone, None: as many as there are cores, at most 4.

    Raises:
        WorkerDiedError: Naming the rows that a worker died on.
    """
    waiting = portions(records)
    alone = RowWork(task)
    count = workers or min(DEFAULT_WORKERS, os.cpu_count() or 1)
    started = time.monotonic()
    for portion in waiting:
        yield from _paired(portion, alone.results(portion))
        if count > 1 and time.monotonic() - started >= SECONDS_ALONE:
            break
    following = next(waiting, None)
    if following is None:
        return
    with ExitStack() as stack:
        pool = [stack.enter_context(_Worker(task)) for _ in range(count)]
        turns: deque[_Worker] = deque()
        for portion, worker in zip(chain([following], waiting), cycle(pool), strict=False):
            if len(turns) == PORTIONS_EACH * count:
                yield from turns.popleft().next_worked()
            worker.send(portion)
            turns.append(worker)
        for worker in turns:
            yield from worker.next_worked()


def _paired(portion: Portion, results: Iterable[Result]) -> Iterator[Worked]:
    start = 0
    for result in results:
        end = start + len(result.outcomes)
        yield portion.records[start:end], result
        start = end


class _Worker:
    """A process and the portions that it has been sent."""

    def __init__(self, task: Task) -> None:
        self._connection, theirs = Pipe()
        handle = theirs.fileno()
        # -P: nothing is imported from the working folder that this program would not find there.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from vlmtune.data.workers import main; main({handle})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], pass_fds=[handle], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._sent: deque[Portion] = deque()
        with self._alive():
            self._connection.send(task)

    def __enter__(self) -> Self:
        return self

    def send(self, portion: Portion) -> None:
        self._sent.append(portion)
        with self._alive():
            self._connection.send(portion)

    def next_worked(self) -> Iterator[Worked]:
        """What became of the portion sent first."""
        yield from _paired(self._sent[0], self._results())
        self._sent.popleft()

    def _results(self) -> Iterator[Result]:
        last = False
        while not last:
            with self._alive():
                result: Result | _Defect = self._connection.recv()
            if isinstance(result, _Defect):
                raise RuntimeError(f"a worker of prepare failed:\n{result.trace}")
            last = result.last
            yield result

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):  # its end of the connection is closed
            status = self._process.wait()
            how = f"signal {-status}" if status < 0 else f"status {status}"
            rows = "before its first row"
            if self._sent:
                first, records = self._sent[0]
                rows = (
                    f"at work on rows {first} to {first + len(records) - 1} "
                    f"({records[0].where} to {records[-1].where})"
                )
            raise WorkerDiedError(
                f"a worker process ended with {how}, {rows}; nothing was written. Often memory "
                "has run out: try again with --workers 1, or look at these rows"
            ) from None

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


def main(handle: int) -> None:
    """A worker's whole life. Ctrl-C is the starting process's to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(handle)
    received: queue.SimpleQueue[Task | Portion] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, received), daemon=True).start()
    try:
        work: RowWork | None = None
        while True:
            match received.get():
                case Task() as task:
                    work = RowWork(task)
                case Portion() as portion if work is not None:
                    for result in work.results(portion):
                        _send(connection, result)
    except Exception:  # noqa: BLE001 - told to the process that can show it
        _send(connection, _Defect(traceback.format_exc()))


def _send(connection: Connection, result: Result | _Defect) -> None:
    try:
        connection.send(result)
    except OSError:
        os._exit(0)  # the starting process is gone


def _receive(connection: Connection, received: queue.SimpleQueue[Task | Portion]) -> None:
    """Always ready to receive: two processes that both wait for the other to read never end."""
    try:
        while True:
            received.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)  # the starting process is gone
    except BaseException:  # noqa: BLE001 - without this thread the process would wait for ever
        traceback.print_exc()
        os._exit(1)
