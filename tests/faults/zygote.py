"""Runs training in processes that die on purpose. Not a test: ``test_kill.py`` starts it.

It imports everything once and forks a child a job, so that a killed run costs a second and not the
ten that importing torch takes. A request is a JSON list of jobs on a line of standard input; all
its children run at once; the answer is a JSON list of what became of them.

An *event* is a place where a kill could leave something half done: each write, sync, rename and
deletion, before and after. Their order is the same in every run.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiny_world import tiny_recipe
from vlmtune.batching import planner
from vlmtune.errors import VlmtuneError
from vlmtune.runs import checkpoints as sealing
from vlmtune.training import checkpoint, loop, saving, writing
from vlmtune.training.distributed import strategy
from vlmtune.verbs import merge, train

NEW_USER, NEW_MOUNTS, REMOUNT = 0x10000000, 0x00020000, 32  # of Linux


class Events:
    """Counts the events of a child, and strikes at one of them.

    Attributes:
        seen: Where each event happened, as ``save:rename:before``.
    """

    def __init__(self, at: int | None, strike: Callable[[], None]) -> None:
        self.seen: list[str] = []
        self._at, self._strike = at, strike
        self._part = "start"

    def happen(self, name: str) -> None:
        self.seen.append(f"{self._part}:{name}")
        if len(self.seen) - 1 == self._at:
            self._strike()

    def watch(self, place: Any, name: str) -> None:
        """Make each call of a function two events."""
        function = vars(place)[name]

        def watched(*arguments: Any, **options: Any) -> Any:
            self.happen(f"{name}:before")
            value = function(*arguments, **options)
            self.happen(f"{name}:after")
            return value

        setattr(place, name, watched)

    def tear(self, place: Any, name: str) -> None:
        """Make a moment an event when a file is half written."""
        write = vars(place)[name]

        def torn(tensors: Any, path: Path, *rest: Any, **options: Any) -> Any:
            value = write(tensors, path, *rest, **options)
            content = Path(path).read_bytes()
            Path(path).write_bytes(content[: len(content) // 2])
            self.happen("half written")
            Path(path).write_bytes(content)
            return value

        setattr(place, name, torn)

    def tear_lines(self, place: Any, name: str) -> None:
        """Make a moment an event when half a line is appended."""
        append = vars(place)[name]

        def torn(path: Path, records: list[dict[str, Any]]) -> None:
            size = path.stat().st_size if path.exists() else 0
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(records[0])[:20])
            self.happen("half a line")
            os.truncate(path, size)
            append(path, records)

        setattr(place, name, torn)

    def enter(self, place: Any, name: str, part: str) -> None:
        """Call events by the part of the run in which they happen."""
        function = vars(place)[name]

        def entered(*arguments: Any, **options: Any) -> Any:
            outer, self._part = self._part, part
            try:
                return function(*arguments, **options)
            finally:
                self._part = outer

        setattr(place, name, entered)

    def install(self) -> None:
        self.tear(checkpoint, "save_file")
        self.tear(strategy, "save_file")
        self.tear_lines(writing, "append_lines")
        for place, name in (
            (os, "fsync"),
            (shutil, "rmtree"),
            (Path, "rename"),
            (Path, "replace"),
            (Path, "mkdir"),
            (Path, "write_text"),
            (writing, "append_lines"),
            (sealing, "_sha256"),
        ):
            self.watch(place, name)
        self.enter(saving, "make_room", "save")
        self.enter(saving, "write_checkpoint", "save")
        self.enter(saving, "prune", "prune")
        self.enter(train, "run", "loop")
        self.enter(train, "write_summary", "summary")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk() -> None:
    raise OSError(28, "No space left on device")


def later(seconds: float, number: int, times: int) -> None:
    """Send this process a signal after some time."""

    def send() -> None:
        time.sleep(seconds)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    threading.Thread(target=send, daemon=True).start()


def forget_random() -> None:
    checkpoint._restore_random = lambda *_: None


def forget_sampler() -> None:
    planner.Plan._order = lambda plan, _epoch: np.arange(len(plan.kept))[::-1]


def forget_schedule() -> None:
    """Learning rates as if the run began where it is resumed."""
    own = loop.set_learning_rates

    def begun_anew(optimizer: Any, config: Any, step: int, steps: int) -> None:
        own(optimizer, config, max(1, step - 4), steps)

    loop.set_learning_rates = begun_anew


def forget_optimizer() -> None:
    strategy.Strategy.restore = lambda *_: None


def own_disk(place: str, size: int) -> None:
    """A disk that this process alone sees, of so many bytes; asked again, it grows or shrinks."""
    library = ctypes.CDLL(None, use_errno=True)
    mounted, user, group = os.path.ismount(place), os.getuid(), os.getgid()
    if not mounted:
        if library.unshare(NEW_USER | NEW_MOUNTS):
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="utf-8")
        Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="utf-8")
    flags = REMOUNT if mounted else 0
    if library.mount(b"tmpfs", place.encode(), b"tmpfs", flags, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount")


def on_a_small_disk(job: dict[str, Any], out: Path) -> None:
    """Train until the disk is full, look at what is left, and go on with room."""
    place, run = job["disk"], f"{job['disk']}/run"
    own_disk(place, job["bytes"])
    recipe = tiny_recipe(Path(job["base"]), Path(job["data"]), **job["changes"])
    told, status = "", 0
    try:
        train.train(recipe, run_dir=run)
    except VlmtuneError as error:
        told, status = str(error), error.exit_status
    named = sealing.checkpoints(Path(run, "checkpoints"))
    wrong = [fault for path in named for fault in sealing.faults(path)]
    left = [path.name for path in Path(run, "checkpoints").rglob(".*")]
    own_disk(place, 2**30)
    train.train(recipe, run_dir=run, resume=True)
    shutil.copytree(run, job["run"])
    found = {"told": told, "status": status, "wrong": wrong, "left": left, "saved": len(named)}
    (out / "stderr").write_text(json.dumps(found), encoding="utf-8")


FORGET = {
    "random": forget_random,
    "sampler": forget_sampler,
    "schedule": forget_schedule,
    "optimizer": forget_optimizer,
}


def work(job: dict[str, Any], out: Path) -> None:
    """One child's life."""
    # A real process starts with random states of its own.
    noise = int.from_bytes(os.urandom(4))
    random.seed(noise)
    np.random.seed(noise)
    torch.manual_seed(noise)
    strikes = {
        "kill": die,
        "full": fill_the_disk,
        "signal": lambda: os.kill(os.getpid(), job["signal"]),
    }
    events = Events(job.get("event"), strikes[job.get("by", "kill")])
    events.install()
    if job.get("forget"):
        FORGET[job["forget"]]()
    if "after" in job:
        later(job["after"], job["signal"], job.get("times", 1))
    if "disk" in job:
        on_a_small_disk(job, out)
    elif "merge" in job:
        merge.merge(job["merge"], job["out"])
    else:
        # Written behind the training, events would come in another order each time; a kill at some
        # time or other needs no order.
        behind = "event" not in job and "after" in job
        changes = {"training__save_behind": behind, **job["changes"]}
        recipe = tiny_recipe(Path(job["base"]), Path(job["data"]), **changes)
        train.train(recipe, run_dir=job["run"], resume=job.get("resume", False))
    (out / "events").write_text(json.dumps(events.seen), encoding="utf-8")
    (out / "modules").write_text("\n".join(sys.modules), encoding="utf-8")


def child(job: dict[str, Any], out: Path) -> None:
    started = time.monotonic()
    descriptor = os.open(out / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os.dup2(descriptor, 1)
    status = 0
    try:
        work(job, out)
    except VlmtuneError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        status = error.exit_status
    except BaseException:  # noqa: BLE001 - a child must not return into its parent's loop
        sys.excepthook(*sys.exc_info())
        status = 99
    (out / "seconds").write_text(str(time.monotonic() - started), encoding="utf-8")
    sys.stderr.flush()
    os._exit(status)


def import_all(modules: Path) -> None:
    """Import here what a child had to, so that its successors need not."""
    names = modules.read_text(encoding="utf-8").split() if modules.exists() else []
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def serve(scratch: Path) -> None:
    count = 0
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            count += 1
            out = scratch / str(count)
            out.mkdir()
            pid = os.fork()
            if pid == 0:
                child(job, out)
            children.append((pid, out))
        answers = []
        for pid, out in children:
            _, status = os.waitpid(pid, 0)
            answers.append(
                {"pid": pid, "status": os.waitstatus_to_exitcode(status), "out": str(out)}
            )
            import_all(out / "modules")
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
