"""Starting the processes of a run, through the API that torchrun itself is made of."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from vlmtune.errors import UsageError, VlmtuneError

GRACE = 120  # seconds for processes to save and leave, after a signal or another's fault
PATIENCE = 900  # seconds for other machines to come
MOST_THREADS = 8
ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # to stop; others are accidents


class ProcessError(VlmtuneError):
    """What the first process that failed has to say; its exit status becomes ours."""

    def __init__(self, code: str, message: str, status: int) -> None:
        super().__init__(message)
        self.code, self.exit_status = code, status


@dataclass(frozen=True)
class Launch:
    """How many processes, and where.

    Attributes:
        devices: Processes on this machine, one a GPU, or so many on the CPU.
        nodes: Machines.
        node_rank: This machine among them, from 0.
        rendezvous: ``host:port`` of the machine of rank 0.
    """

    devices: int = 1
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None

    @property
    def several(self) -> bool:
        """Whether there is anything to start."""
        return self.devices * self.nodes > 1

    def check(self) -> None:
        """Refuse what cannot be started.

        Raises:
            UsageError: Naming the option.
        """
        for fault in self._faults():
            raise UsageError(fault)

    def _faults(self) -> Iterator[str]:
        if self.devices < 1 or self.nodes < 1:
            yield "--devices and --nodes: expected at least 1"
        if self.nodes > 1 and self.rendezvous is None:
            yield (
                f"--rendezvous: {self.nodes} nodes must find each other; give HOST:PORT of the one "
                "with --node-rank 0, the same on all"
            )
        if self.rendezvous is not None and not self.rendezvous.rpartition(":")[2].isdecimal():
            yield f"--rendezvous: found {self.rendezvous!r}, expected HOST:PORT"
        if not 0 <= self.node_rank < self.nodes:
            yield (
                f"--node-rank: found {self.node_rank}, expected 0 to {self.nodes - 1} of "
                f"--nodes {self.nodes}, each on one machine"
            )
        if self.several and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            yield (
                "--devices: this process was started by a launcher such as torchrun already; leave "
                "the option out, or start vlmtune without the launcher"
            )
        if self.several:
            import torch

            gpus = torch.cuda.device_count()
            if torch.cuda.is_available() and self.devices > gpus:
                yield f"--devices: found {self.devices}, and this machine shows {gpus} GPUs"


@dataclass(frozen=True)
class Outcomes:
    """Where processes leave what they return, and how they failed.

    Attributes:
        folder: On this machine, for this launch alone.
    """

    folder: Path

    def returned(self, value: Mapping[str, Any]) -> None:
        """Leave the result; the first process of all does."""
        (self.folder / "result.json").write_text(json.dumps(value), encoding="utf-8")

    def failed(self, rank: int, code: str, message: str, status: int, *, ours: bool) -> None:
        """Leave an error.

        Args:
            rank: Whose.
            code: Its stable name.
            message: A paragraph for people.
            status: The exit status that it stands for.
            ours: Whether it is of our tree, and no consequence of another process's end.
        """
        record = {"rank": rank, "code": code, "message": message, "status": status}
        record |= {"ours": ours, "time": time.time()}
        with (self.folder / "errors.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")  # one write: lines of several do not mix

    def result(self) -> dict[str, Any]:
        """What the first process returned; nothing on other machines than its own."""
        path = self.folder / "result.json"
        found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return found

    def errors(self) -> list[dict[str, Any]]:
        """Errors in the order in which they came."""
        path = self.folder / "errors.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]


def start(launch: Launch, module: str, arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run ``python -m module`` in all processes of this machine, and wait for them.

    Signals go on to them, and they have two minutes to save (TORCH_ELASTIC_SHUTDOWN_TIMEOUT: other
    seconds); where one fails, the others are told to stop.

    Args:
        launch: How many, and where.
        module: What each of them runs.
        arguments: Its arguments.
        folder: Where they leave their ``Outcomes``.

    Returns:
        What the first process returned; nothing on other machines than its own.

    Raises:
        ProcessError: What the process said that failed first.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(launch.devices)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    outcomes = Outcomes(folder)
    command = (sys.executable, "-m", module, *arguments)
    try:
        with _one_signal(), _quiet():
            elastic_launch(_config(launch, folder), command[0])(*command[1:])
    except ChildFailedError as error:
        ends = {rank: each.exitcode for rank, each in error.failures.items()}
        raise _first(outcomes, launch, ends) from None
    except SignalException as error:
        if outcomes.result() and not outcomes.errors():
            return outcomes.result()  # it came when all was done
        raise _first(outcomes, launch, {0: -error.sigval}, asked=True) from None
    except DistError as error:
        if launch.nodes == 1:
            raise
        raise VlmtuneError(
            f"--rendezvous: the {launch.nodes} machines did not find each other at "
            f"{launch.rendezvous} ({str(error).splitlines()[0]}); start the command on all of "
            "them, with the address of the one of --node-rank 0 and a port that is free there"
        ) from None
    return outcomes.result()


def _config(launch: Launch, folder: Path) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.utils.distributed import get_free_port
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=launch.nodes,
        max_nodes=launch.nodes,
        nproc_per_node=launch.devices,
        max_restarts=0,  # --resume goes on from a checkpoint, and says so
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
        signals_to_handle="SIGQUIT",  # the others are ours
        rdzv_backend="static",
        rdzv_endpoint=launch.rendezvous or f"127.0.0.1:{get_free_port()}",
        rdzv_configs={"rank": launch.node_rank, "timeout": PATIENCE},
        run_id="vlmtune",  # of all machines
    )


def _first(
    outcomes: Outcomes, launch: Launch, ends: Mapping[int, int], *, asked: bool = False
) -> ProcessError:
    """The error that explains the others.

    A process that was killed could say nothing, and the connections of all others broke; an error
    of our tree is a cause; of the rest, the earliest.

    Args:
        outcomes: What the processes of this machine said.
        launch: Of how many machines this is one.
        ends: Exit status of each process that failed; minus the signal that ended it.
        asked: Whether it was we who were told to stop.
    """
    errors = sorted(outcomes.errors(), key=lambda error: not error["ours"])
    cause = errors[0] if errors and errors[0]["ours"] else None
    # A process that does not leave in time after another's error is killed, too.
    lasted = cause is not None and time.time() - cause["time"] >= GRACE
    accidents = {rank: -end for rank, end in ends.items() if end < 0 and -end not in ASKED}
    if accidents and not lasted:
        return _killed(*next(iter(accidents.items())))
    if asked and cause is None:
        errors = []  # connections that broke, as the others left
    if not errors:
        return _stopped(-min(ends.values()))
    first = errors[0]
    said = f" (process {first['rank']})" if first["rank"] else ""
    if launch.nodes > 1 and not first["ours"]:
        said += ". The cause may stand in the output of another machine"
    return ProcessError(first["code"], f"{first['message']}{said}", first["status"])


def _stopped(number: int) -> ProcessError:
    if number <= 0:
        return ProcessError("failed", "a process ended without a word; --debug may show more", 1)
    return ProcessError(
        "stopped",
        f"stopped by {signal.Signals(number).name} outside of the training; checkpoints that were "
        "written are intact. Go on with the same command and --resume",
        128 + number,
    )


def _killed(rank: int, number: int) -> ProcessError:
    name = signal.Signals(number).name
    memory = " Often that is the machine that ran out of memory." if name == "SIGKILL" else ""
    return ProcessError(
        "killed",
        f"process {rank} was killed by {name}.{memory} The last checkpoint is intact; go on with "
        "the same command and --resume",
        1,
    )


@contextmanager
def _one_signal() -> Iterator[None]:
    """Answer the first signal, and no further one: the processes are saving."""
    from torch.distributed.elastic.multiprocessing import SignalException

    def answer(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for each in ASKED:
            signal.signal(each, signal.SIG_IGN)
        sent = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        raise SignalException(sent.name, sigval=sent)

    old = {number: signal.signal(number, answer) for number in ASKED}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """What torchrun's library logs is about its own affairs; nothing else runs meanwhile."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def end_with(parent: int) -> None:
    """End this process a while after the one that started it is gone, e.g. by ``kill -9``.

    It is told to save and leave first.

    Args:
        parent: Process id of the one that started it.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="vlmtune-orphan", daemon=True).start()


def _threads(devices: int) -> int:
    """Threads of torch in each process: they share the cores."""
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // devices))
