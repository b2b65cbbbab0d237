"""The quickstart's figures: each task in an empty home, and the same base on real formulas.

    python benchmarks/quickstart.py [--tasks formulas shapes boxes] [--real DIR] [--result NAME]

Each task is ``vlmtune quickstart --task`` in a process of its own, with two threads and without a
network where the system can cut it off. DIR holds a CSV of formula pictures (columns image_path and
text) that the base is tuned on by the recipe ``quickstart``, 200 of them held out. Metrics come
with the 95 % intervals of the run's own report.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, machine, run_child, table, write_result

TASKS = ("formulas", "shapes", "boxes")
HELD_OUT = 200
# The letters of the real pictures are a third as large as those that the base has read.
# Pictures so large take long to look at: once each, by eyes that stay as they are.
REAL = (
    "image.min_pixels=50176", "image.max_pixels=100352", "evaluation.max_new_tokens=160",
    "tuning.train=[language]", "tuning.learning_rates={}", "tuning.dropout=0",
    "training.batch_size=16", "training.learning_rate=6e-3", "training.epochs=6",
)  # fmt: skip


def vlmtune(*arguments: str) -> list[str]:
    """A command of ours, without a network if possible."""
    unshare = shutil.which("unshare")
    cut_off = [unshare, "--map-root-user", "--net"] if unshare else []
    if cut_off and subprocess.run([*cut_off, "true"], check=False).returncode:
        cut_off = []
    return [*cut_off, sys.executable, "-m", "vlmtune", *arguments]


def measured(run: Path) -> dict[str, Any]:
    """Steps and metrics of a finished run."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    metrics = {
        when: json.loads((run / "evaluation" / when / "metrics.json").read_text(encoding="utf-8"))
        for when in ("before", "after")
    }
    return {
        "steps": result["steps"],
        "training_s": round(result["seconds"], 1),
        "samples": metrics["after"]["samples"],
        **{when: found["metrics"] for when, found in metrics.items()},
    }


def quickstart(folder: Path, task: str) -> dict[str, Any]:
    """One task in an empty home."""
    home = folder / f"home-{task}"
    home.mkdir()
    out = folder / task
    log = folder / f"{task}.log"
    used = run_child(
        vlmtune("quickstart", "--task", task, "--out", str(out)),
        log,
        environment={"HOME": str(home), "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
    )
    if used is None:
        raise SystemExit(log.read_text(encoding="utf-8"))
    return {**used, **measured(out / "run")}


def real(folder: Path, data: Path) -> dict[str, Any]:
    """The base on real formulas."""
    source, prepared, run = next(data.glob("*.csv")), folder / "real", folder / "real-run"
    options = ("--out", str(prepared), "--validation", str(HELD_OUT))
    log = folder / "real.log"
    prepare = vlmtune("prepare", str(source), *options)
    train = vlmtune("train", "quickstart", f"data.path={prepared}", *REAL, "--run", str(run))
    used = run_child(prepare, log) and run_child(train, log)
    if not used:
        raise SystemExit(log.read_text(encoding="utf-8"))
    return {**used, **measured(run)}


def shown(name: str, found: dict[str, Any]) -> list[list[str]]:
    """Rows of the table: a metric each."""
    return [
        [name, metric, *(_interval(found[when][metric]) for when in ("before", "after")),
         f"{found['wall_s']:.0f}", f"{found['processor_s']:.0f}",
         f"{found['peak_bytes'] / 1e9:.2f}"]
        for metric in found["after"]
    ]  # fmt: skip


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} … {estimate['high']:.3f})"


def main() -> None:
    """Measure, print, and write ``results/NAME.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=TASKS)
    parser.add_argument("--real", type=Path, help="folder of a CSV of formula pictures")
    parser.add_argument("--result", default="quickstart-cpu", help="name of the file written")
    asked = parser.parse_args()
    result = machine("vlmtune", "torch", "transformers", "peft")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {task: quickstart(folder, task) for task in asked.tasks}
        if asked.real is not None:
            found["real formulas"] = real(folder, asked.real)
    rows = [row for name, figures in found.items() for row in shown(name, figures)]
    header = ("task", "metric", "before", "after", "wall s", "processor s", "memory GB")
    print(table(header, rows))
    write_result(RESULTS / f"{asked.result}.json", result | {"tasks": found})


if __name__ == "__main__":
    main()
