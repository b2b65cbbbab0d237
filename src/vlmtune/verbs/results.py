"""What a run returns."""

from __future__ import annotations

from typing import Any

from vlmtune.evaluation.run import Evaluation
from vlmtune.runs.folder import RunFolder
from vlmtune.runs.resolve import latest_checkpoint
from vlmtune.training.summary import totals


def result_of(folder: RunFolder) -> dict[str, Any]:
    """The keys of ``vlmtune train --json``, read from a run's folder."""
    figures = totals(folder)
    steps = folder.steps()
    return {
        "run": str(folder),
        "checkpoint": str(latest_checkpoint(folder)),
        "steps": int(figures["steps"]),
        "samples": int(figures["samples"]),
        "seconds": round(figures["seconds"], 3),
        "samples_per_second": round(figures["samples_per_second"], 3),
        "loss": steps[-1].get("loss") if steps else None,
        "before": _values(Evaluation.read(folder.evaluation("before"))),
        "after": _values(Evaluation.read(folder.evaluation("after"))),
        "best": _best(steps),
        "report": str(folder.report),
    }


def _values(evaluation: Evaluation | None) -> dict[str, float]:
    if evaluation is None:
        return {}
    return {name: estimate.value for name, estimate in evaluation.metrics.items()}


def _best(steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The step of the lowest loss on the probe; a checkpoint of that step is never pruned."""
    probed = [record for record in steps if "probe_loss" in record]
    if not probed:
        return None
    best = min(probed, key=lambda record: float(record["probe_loss"]))
    return {"step": best["step"], "probe_loss": best["probe_loss"]}
