"""The run folder: where everything about a run lies, and who may write into it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmtune.errors import DiskFullError, RunExistsError, UsageError
from vlmtune.files import read_lines, write_json, write_text


class RunFolder:
    """Paths of a run. Nothing is created by making one of these.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.data = self.path / "data.json"
        self.contract = self.path / "contract.json"
        self.recomputed = self.path / "recomputed.json"  # what was decided about checkpointing
        self.metrics = self.path / "metrics.jsonl"
        self.ledger = self.path / "ledger.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.html"
        self.card = self.path / "README.md"
        self.differences = self.path / "differences.json"  # after compared with before
        self.result = self.path / "result.json"

    def __str__(self) -> str:
        return str(self.path)

    def evaluation(self, when: str) -> Path:
        """Folder of an evaluation: ``before``, ``after`` or a name of one's own."""
        return self.path / "evaluation" / when

    @property
    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return self.recipe.exists()

    def start(
        self,
        recipe: str,
        environment: dict[str, Any],
        data: dict[str, Any],
        contract: dict[str, Any],
    ) -> None:
        """Begin a new run.

        Raises:
            RunExistsError: If the folder holds anything already but a start that was killed.
        """
        if self.exists:
            raise RunExistsError(
                f"{self.path} already holds a run; continue it with --resume, or choose another "
                "folder with --run DIR"
            )
        strangers = [entry.name for entry in self.path.iterdir() if not self._is_ours(entry)]
        if strangers:
            raise RunExistsError(
                f"{self.path} is not empty (it holds {', '.join(sorted(strangers)[:3])}); choose "
                "another folder with --run DIR"
            )
        self.checkpoints.mkdir(exist_ok=True)
        write_json(self.environment, environment)
        write_json(self.data, data)
        write_json(self.contract, contract)
        write_text(self.recipe, recipe)  # last: from now on it is a run

    def _is_ours(self, entry: Path) -> bool:
        """Whether a start that was killed before it wrote the recipe leaves this."""
        if entry == self.checkpoints:
            return entry.is_dir() and not any(entry.iterdir())
        return entry.name == LOCK or entry in (self.environment, self.data, self.contract)

    def read_result(self) -> dict[str, Any] | None:
        """What the finished run returned, or None if it is not finished."""
        if not self.result.exists():
            return None
        value: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return value

    def steps(self) -> list[dict[str, Any]]:
        """Records of ``metrics.jsonl``."""
        return list(read_lines(self.metrics))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; a killed holder lets go of it by itself.

        Raises:
            RunExistsError: If another process works here.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--run: {self.path} is a file, expected a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("a+", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                raise RunExistsError(
                    f"{self.path} is in use by {holder}; wait for it, or choose another folder "
                    "with --run DIR"
                ) from error
            for leftover in self.path.iterdir():
                if TORN.match(leftover.name):  # of a process killed while it wrote
                    leftover.unlink()
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {platform.node()}")
            stream.flush()
            yield

    @contextmanager
    def full_disk_told(self) -> Iterator[None]:
        """Say in a sentence that there is no room to write.

        Raises:
            DiskFullError: Wherever in the run it is found.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFullError(
                f"{self.path}: {error}. Checkpoints that were saved are intact; make room and "
                "continue with --resume"
            ) from error


LOCK = ".lock"
TORN = re.compile(r"^\..+\.\d+\.tmp$")  # as ``write_text`` names what it has not finished


def describe_environment() -> dict[str, Any]:
    """Versions and hardware, for ``environment.json``."""
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in ("vlmtune", "torch", "transformers", "tokenizers", "peft", "pillow", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": packages,
        "commit": commit(),
    }


def commit() -> str | None:
    """The git commit of the code that runs, where it runs from a checkout."""
    import subprocess

    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
