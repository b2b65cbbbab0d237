"""What all benchmarks share: running a child and measuring it, tables, and where it ran."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks/results"


def pinned(core: int | None) -> list[str]:
    """The beginning of a command that keeps to one core."""
    return [] if core is None else ["taskset", "-c", str(core)]


def run_child(
    command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Run a command with one thread and no network.

    Returns:
        Its wall and processor seconds, highest resident memory (bytes) and exit status, which is
        the negative number of a signal if one killed it.
    """
    settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # Reported as it is: a warning about a tokenizer's threads would be noise in the log.
    everything = {**os.environ, **settings, "TOKENIZERS_PARALLELISM": "false"}
    everything |= environment or {}
    with log.open("wb") as stream:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=stream, stderr=stream, env=everything)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
    return {
        "status": child.returncode,
        "wall_s": round(wall, 3),
        "processor_s": round(used.ru_utime + used.ru_stime, 3),
        "peak_bytes": used.ru_maxrss * 1024,
    }


def fault_of(used: Mapping[str, float], log: Path) -> str | None:
    """Why a command failed; None if it did not."""
    if not used["status"]:
        return None
    if used["status"] == -signal.SIGKILL:
        held = used["peak_bytes"] / 1e9
        return f"killed by the system, as it is for lack of memory, when it held {held:.1f} GB"
    return " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-300:]


def machine(*packages: str) -> dict[str, Any]:
    """Where and with what it ran, in general words."""
    git = ["git", "-C", str(REPOSITORY)]
    return {
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), {memory()} GB, {accelerator()}",
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": told(*git, "rev-parse", "HEAD"),
        "changed_since": told(*git, "status", "--porcelain", "src/vlmtune") != "",
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_arguments()]),
    }


def accelerator() -> str:
    """The GPU's name, if there is one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"


def _arguments() -> list[str]:
    """The command's arguments, folders of this machine by their last name."""
    return [f"…/{Path(word).name}" if word.startswith("/") else word for word in sys.argv[1:]]


def memory() -> int:
    """Memory of the machine in GB."""
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)


def told(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def middle(values: Iterable[float]) -> dict[str, float]:
    """Median and minimum."""
    listed = list(values)
    return {"median": round(statistics.median(listed), 3), "min": round(min(listed), 3)}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
