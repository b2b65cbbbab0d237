"""``train --profile``: what a few steps spend their time on, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

WAITING, WARMING, RECORDED = 1, 1, 3  # steps; the first ones do what later ones need not


@contextmanager
def profiled(folder: Path) -> Iterator[Callable[[], None]]:
    """Record a few steps into ``folder/trace.json``, for chrome://tracing or Perfetto.

    Args:
        folder: Made if it is not there.

    Yields:
        To be called after each step.
    """
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)

    def write(profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=40)
        (folder / "table.txt").write_text(table, encoding="utf-8")

    plan = schedule(wait=WAITING, warmup=WARMING, active=RECORDED, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
