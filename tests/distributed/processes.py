"""Work done by several forked processes that are joined as a launcher would join them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlmtune.training.distributed.ranks import Ranks, join, leave

CONTEXT = multiprocessing.get_context("fork")  # spawned children would import torch anew
LIMIT = 900  # seconds; pytest gives most tests less


def together(count: int, work: Callable[[Ranks], Any]) -> dict[int, Any]:
    """What ``work`` returns in each of ``count`` processes; its traceback where it fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = CONTEXT.Queue()
    children = [
        CONTEXT.Process(target=_child, args=(rank, count, port, work, results))
        for rank in range(count)
    ]
    # What earlier tests left, with threads behind it, a child would stumble over as it frees it.
    gc.collect()
    gc.freeze()
    try:
        for process in children:
            process.start()
    finally:
        gc.unfreeze()
    try:
        return dict(results.get(timeout=LIMIT) for _ in children)
    except queue.Empty:
        pytest.fail("a process waits for ever")
    finally:
        for process in children:
            process.join(5)
            process.kill()


def _child(rank: int, count: int, port: int, work: Callable[[Ranks], Any], results: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        results.put((rank, work(join())))
    except BaseException:  # noqa: BLE001  # shown by the parent
        results.put((rank, traceback.format_exc()))
    finally:
        leave()
