"""A process that starts others and reports how they ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        pid: Its process number.
        status: Exit status; minus the signal that killed it.
        said: Its standard error.
        events: Names of its events, where it lived to tell.
        seconds: How long it ran, where it lived to tell.
    """

    pid: int
    status: int
    said: str
    events: list[str]
    seconds: float


Zygote = Callable[..., list[Ended]]


def _ended(pid: int, status: int, out: str) -> Ended:
    folder = Path(out)
    events, seconds = folder / "events", folder / "seconds"
    return Ended(
        pid,
        status,
        (folder / "stderr").read_text(encoding="utf-8"),
        json.loads(events.read_text(encoding="utf-8")) if events.exists() else [],
        float(seconds.read_text(encoding="utf-8")) if seconds.exists() else 0.0,
    )


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Runs jobs at once, each in a process of its own, and waits for all of them."""
    scratch = tmp_path_factory.mktemp("zygote")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(TESTS / "faults/zygote.py"), str(scratch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(*jobs: dict[str, Any]) -> list[Ended]:
        process.stdin.write(json.dumps(jobs) + "\n")
        process.stdin.flush()
        answers = json.loads(process.stdout.readline())
        return [_ended(**answer) for answer in answers]

    yield run
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()
