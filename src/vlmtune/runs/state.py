"""Which runs there are below a folder, and how each of them stands."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from vlmtune.files import read_lines
from vlmtune.runs.checkpoints import checkpoints, faults, step_of
from vlmtune.runs.folder import LOCK, RunFolder

Kind = Literal["finished", "running", "stopped", "damaged"]
HOLDER = re.compile(r"process (\d+) on (.*)")  # as ``RunFolder.lock`` names it
DEEPEST = 3  # folders below the one that was named


@dataclass(frozen=True)
class RunState:
    """How a run stands.

    Attributes:
        kind: In a word.
        step: The last optimizer step that was logged.
        checkpoint: The step of its newest checkpoint; None if there is none.
        why: What is wrong with a damaged one.
    """

    kind: Kind
    step: int
    checkpoint: int | None = None
    why: str = ""

    @property
    def words(self) -> str:
        """For people."""
        if self.kind == "damaged":
            return f"damaged: {self.why}"
        if self.kind == "finished":
            return "finished"
        if self.kind == "running":
            return f"running, at step {self.step:,}"
        if not self.step:
            return "stopped before its first step"
        left = "" if self.checkpoint == self.step else f", goes on from {self.checkpoint or 0:,}"
        return f"stopped at step {self.step:,}{left}"


def find_runs(folder: Path, deepest: int = DEEPEST) -> Iterator[Path]:
    """Runs in a folder and below it, in order of their names; the folder itself if it is one."""
    if looks_like_run(folder):
        yield folder
    elif deepest:
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.name.startswith(".") and not entry.is_symlink():
                yield from find_runs(entry, deepest - 1)


def looks_like_run(folder: Path) -> bool:
    """Whether a folder is a run, or what is left of one."""
    run = RunFolder(folder)
    begun = run.exists or run.checkpoints.is_dir()
    return (begun and run.environment.is_file()) or (run.metrics.is_file() and run.ledger.is_file())


def state_of(run: RunFolder) -> RunState:
    """How a run stands; weights are not hashed, only their sizes are looked at."""
    saved = checkpoints(run.checkpoints)
    newest = step_of(saved[-1]) if saved else None
    why = damaged_files(run)
    step = 0 if why else max((int(record["step"]) for record in read_lines(run.metrics)), default=0)
    why = why or _damaged_checkpoint(run, saved)
    if _is_held(run):  # what it is writing right now may look damaged
        return RunState("running", step, newest)
    if why:
        return RunState("damaged", step, newest, why)
    if run.result.is_file():
        return RunState("finished", step, newest)
    return RunState("stopped", step, newest)


def damaged_files(run: RunFolder) -> str:
    """What is wrong with a run's files, its checkpoints left aside; empty if nothing is."""
    if not run.exists:
        return f"{run.recipe.name} is missing (deleted, or killed while it started)"
    file = run.recipe
    try:
        if not isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict):
            return f"{file.name} holds no options"
        for file in (run.metrics, run.ledger):
            if not all(isinstance(record.get("step", 0), int) for record in read_lines(file)):
                return f"{file.name}: a step is no number"
        for file in (run.environment, run.data, run.contract, run.result, *_evaluations(run)):
            if file.exists() or file != run.result:
                json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        return f"{file.relative_to(run.path)}: {_short(error)}"
    return ""


def _damaged_checkpoint(run: RunFolder, saved: Sequence[Path]) -> str:
    if saved:
        found = faults(saved[-1], hashed=False)
        return f"{saved[-1].name}: {found[0]}" if found else ""
    return f"{run.checkpoints.name}: there is none" if run.result.exists() else ""


def _evaluations(run: RunFolder) -> list[Path]:
    return [
        run.evaluation(when) / "metrics.json"
        for when in ("before", "after")
        if run.evaluation(when).is_dir()
    ]


def _is_held(run: RunFolder) -> bool:
    """Whether a process works in a run's folder."""
    try:
        with (run.path / LOCK).open(encoding="utf-8") as stream:
            # A lock held for a moment could turn away a run that starts just then.
            if _is_gone(stream.read()):
                return False
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _is_gone(holder: str) -> bool:
    """Whether the process that the lock names has ended; False where that cannot be known."""
    found = HOLDER.match(holder)
    if found is None or found[2] != platform.node():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _short(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    return " ".join(str(error).split())[:120] or type(error).__name__
