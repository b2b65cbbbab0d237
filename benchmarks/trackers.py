"""What trackers cost a training: seconds of its steps with trackers over those without.

    python benchmarks/trackers.py [--steps 40]

The same training twice at once, without trackers and with SwanLab and W&B online, step by step in
turns: while one makes a step the other waits, so that whatever else the machine does slows both.
The server, on this machine, behaves, refuses, hangs, answers 500, resets, crawls, knows no key; and
once neither has a tracker, to see what the measurement is worth. Every step is logged. Losses and
weights must be the same to the bit. Needs ``swanlab`` and ``wandb``.

What the trackers' own processes take of the processors slows both alike and is not in the figures;
they have the lowest priority. A step of a real model takes much longer, and is logged at the same
cost.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from trackhub import TROUBLES, trackhub  # noqa: E402
from vlmtune.training.loop import StepReport  # noqa: E402
from vlmtune.training.tracking import background  # noqa: E402
from vlmtune.verbs.observer import Observer  # noqa: E402

NONE, NEITHER, WELL, REFUSE = "none", "neither", "behaves", "refuse"
WAYS = (NEITHER, WELL, REFUSE, *TROUBLES)
SERVICES = ["swanlab", "wandb"]
KEYS = {"SWANLAB_API_KEY": "canaryswanlab01234567", "WANDB_API_KEY": "canarywandb" + "0a" * 15}


class Turns(Observer):
    """Waits at every step until it is this training's turn, and measures its turns.

    A turn is all that happens from one step to the next, telling the trackers included.
    """

    def __init__(self, mine: Connection) -> None:
        self._mine = mine
        self._began = (0.0, 0.0)
        self.taken: list[tuple[float, float]] = []

    def step(self, report: StepReport) -> None:
        """Note seconds and processor seconds, let the other make its step, and wait."""
        now = (time.perf_counter(), time.process_time())
        if report.step > 1:  # there was a turn before
            self.taken.append((now[0] - self._began[0], now[1] - self._began[1]))
        if report.step == 1:
            gc.disable()  # a full collection takes ten steps' time, and comes to each in its turn
            self._mine.recv()  # the first turn is given when both have come here
        else:
            self._mine.send(None)
            self._mine.recv()
        self._began = (time.perf_counter(), time.process_time())


def prepared(place: Path) -> dict[str, Any]:
    """A recipe of a small model on a hundred formulas."""
    from vlmtune.data.prepare import PrepareOptions, prepare
    from vlmtune.formulas import write_formula_table
    from vlmtune.testing import TinySize, tiny

    table = write_formula_table(place / "formulas", 104, seed=3)
    prepare(table, place / "data", PrepareOptions(validation=4))
    base = tiny("qwen2_vl", place / "base", seed=1, size=TinySize(hidden=64, vision_width=32))
    return {
        "name": "tracked",
        "model": {"base": str(base), "device": "cpu"},
        "data": {"path": str(place / "data"), "prompt": "Write this formula in LaTeX."},
        "image": {"max_pixels": 12544},
        "tuning": {"rank": 8, "alpha": 16, "dropout": 0.1},
        "training": {"batch_size": 4, "precision": "fp32", "save_steps": 1000, "log_steps": 1},
        "evaluation": {"before": False, "after": False, "probe": 0},
    }


def trained(
    values: dict[str, Any], run: Path, way: str, url: str, mine: Connection, told: Connection
) -> None:
    """Train in turns, and tell what each took."""
    from vlmtune.recipe import recipe_from
    from vlmtune.verbs.train import train

    for name in ("SWANLAB_API_HOST", "SWANLAB_WEB_HOST", "WANDB_BASE_URL"):
        os.environ[name] = nowhere() if way == REFUSE else url
    os.environ["WANDB_DATA_DIR"] = str(run.parent / "wandb")
    services = [] if way in (NONE, NEITHER) else SERVICES
    turns = Turns(mine)
    train(recipe_from({**values, "tracking": {"to": services}}), run_dir=run, observer=turns)
    told.send({"steps": turns.taken, "fingerprint": fingerprint(run)})


def fingerprint(run: Path) -> str:
    """Of the weights, the optimizer, and every step's loss to the bit."""
    found = hashlib.sha256()
    (last,) = (run / "checkpoints").glob("step-*")
    for file in sorted(last.glob("*.safetensors")):
        found.update(file.read_bytes())
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        found.update(json.loads(line)["loss"].hex().encode())
    return found.hexdigest()


def nowhere() -> str:
    """An address where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


def no_key_in(folder: Path) -> None:
    """Stop if a file below a folder holds a key."""
    for file in folder.rglob("*"):
        if file.is_file() and any(key.encode() in file.read_bytes() for key in KEYS.values()):
            raise SystemExit(f"{file} holds a key")


def measured(values: dict[str, Any], place: Path, way: str) -> dict[str, Any]:
    """A training without trackers and one with them, in turns."""
    context = get_context("fork")
    with trackhub() as hub:
        hub.trouble = way if way in TROUBLES else None
        theirs, told, processes = {}, {}, []
        for name in (NONE, way):
            mine, theirs[name] = context.Pipe()
            told[name], to_tell = context.Pipe(duplex=False)
            options = (values, place / f"{way}-{name}", name, hub.url, mine, to_tell)
            processes.append(context.Process(target=trained, args=options))
            processes[-1].start()
        for _ in range(values["training"]["max_steps"] - 1):
            for turn in theirs.values():
                turn.send(None)
                turn.recv()
        for turn in theirs.values():
            turn.send(None)
        found = {name: end.recv() for name, end in told.items()}
        for process in processes:
            process.join()
    no_key_in(place)
    without, tracked = found[NONE]["steps"], found[way]["steps"]
    alike = found[NONE]["fingerprint"] == found[way]["fingerprint"]
    return {
        "alike_to_the_bit": alike,
        "seconds_over_none": round(total(tracked, 0) / total(without, 0), 3),
        "median_step_over_none": ratio(tracked, without),
        "cpu_over_none": round(total(tracked, 1) / total(without, 1), 3),
        "seconds": {NONE: round(total(without, 0), 2), way: round(total(tracked, 0), 2)},
    }


def total(steps: list[tuple[float, float]], clock: int) -> float:
    """Seconds of all steps by one of the two clocks."""
    return sum(step[clock] for step in steps)


def ratio(tracked: list[tuple[float, float]], without: list[tuple[float, float]]) -> float:
    """The median over the steps of one's seconds over the other's."""
    pairs = zip(tracked, without, strict=True)
    return round(statistics.median(one[0] / other[0] for one, other in pairs), 3)


def machine() -> dict[str, Any]:
    """Where and of what."""
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    packages = ("vlmtune", "torch", "transformers", "swanlab", "wandb")
    return {
        "cores": f"{os.cpu_count()}, shared with other processes",
        "torch_threads": 1,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit,
        "command": " ".join(["python", "benchmarks/trackers.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "benchmarks/results/trackers-cpu.json"
    )
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    os.environ.update(KEYS)
    background.CLOSE_S = 3.0  # what is waited for at the end is no step
    result: dict[str, Any] = {"machine": machine(), "steps": options.steps, "ways": {}}
    with tempfile.TemporaryDirectory() as name:
        os.environ["HOME"] = str(Path(name) / "home")
        values = prepared(Path(name))
        values["training"]["max_steps"] = options.steps
        for way in options.ways:
            result["ways"][way] = measured(values, Path(name), way)
            print(way, result["ways"][way], file=sys.stderr)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
