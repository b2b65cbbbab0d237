"""What the launcher's tests start: processes that do next to nothing, and end as they are told.

``python -m distributed.launched FOLDER`` is one of them. ``python -m distributed.launched FOLDER
COUNT`` starts that many, and says what came of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from vlmtune.cli.worker import left
from vlmtune.errors import RefusedError, VlmtuneError
from vlmtune.training.distributed.launcher import Launch, Outcomes, end_with, start

MODULE = "distributed.launched"
STATUS = 7


class SavedError(VlmtuneError):
    """Stands for a run that was stopped, and saved."""

    code, exit_status = "stopped", 143


def wait_for_signal() -> None:
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    Path(sys.argv[1], f"ready-{os.environ['RANK']}").write_text(str(os.getpid()))
    while not received:
        time.sleep(0.02)
    raise SavedError("saved")


def refuse() -> None:
    raise RefusedError("the reason")


def break_off() -> None:
    raise RuntimeError("connection closed")


def follow() -> None:
    while not Path(sys.argv[1], "errors.jsonl").exists():  # a connection breaks when one is gone
        time.sleep(0.02)
    break_off()


def fall() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    Path(sys.argv[1], f"ready-{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(60)


def nothing() -> None:
    """End well."""


ACTS = {
    act.__name__: act for act in (wait_for_signal, refuse, break_off, follow, fall, sleep, nothing)
}


def child() -> None:
    end_with(os.getppid())
    outcomes, rank = Outcomes(Path(sys.argv[1])), int(os.environ["RANK"])
    acts = json.loads(Path(sys.argv[1], "acts.json").read_text())
    with left(outcomes, rank, debug=False):
        ACTS[acts[rank]]()
        if rank == 0:
            outcomes.returned({"processes": int(os.environ["WORLD_SIZE"])})


def launch(folder: Path, acts: list[str], **options: Any) -> dict[str, Any]:
    """Start a process for each act, and wait for them."""
    folder.mkdir(exist_ok=True)
    (folder / "acts.json").write_text(json.dumps(acts))
    return start(Launch(len(acts), **options), MODULE, [str(folder)], folder)


def main() -> None:
    if len(sys.argv) == 2:
        child()
        return
    folder, acts = Path(sys.argv[1]), sys.argv[2:]
    try:
        print(json.dumps(launch(folder, acts)))
    except VlmtuneError as error:
        print(error)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
