"""What a run returns."""

from __future__ import annotations

from typing import Any

import yaml

from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.run import Evaluation
from vlmtune.runs.best import PROBE_LOSS, best_by, chosen_checkpoint
from vlmtune.runs.folder import RunFolder
from vlmtune.training.summary import totals


def result_of(folder: RunFolder) -> dict[str, Any]:
    """The keys of ``vlmtune train --json``, read from a run's folder."""
    figures = totals(folder)
    steps = folder.steps()
    return {
        "run": str(folder),
        "checkpoint": str(chosen_checkpoint(folder)),
        "steps": int(figures["steps"]),
        "samples": int(figures["samples"]),
        "seconds": round(figures["seconds"], 3),
        "samples_per_second": round(figures["samples_per_second"], 3),
        "loss": steps[-1].get("loss") if steps else None,
        "before": _values(Evaluation.read(folder.evaluation("before"))),
        "after": _values(Evaluation.read(folder.evaluation("after"))),
        "best": _best(folder, steps),
        "report": str(folder.report),
    }


def _values(evaluation: Evaluation | None) -> dict[str, float]:
    if evaluation is None:
        return {}
    return {name: estimate.value for name, estimate in evaluation.metrics.items()}


def _best(folder: RunFolder, steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best step by what the recipe says; a checkpoint of that step is never pruned."""
    recipe = yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))
    name = best_by(recipe["evaluation"]) or PROBE_LOSS
    values = {
        record["step"]: record.get(name, record.get("probe_metrics", {}).get(name))
        for record in steps
    }
    measured = {step: float(value) for step, value in values.items() if value is not None}
    if not measured:
        return None
    rising = name != PROBE_LOSS and find(name).higher_is_better
    # Of equals the first.
    best = min(measured, key=lambda step: (-measured[step] if rising else measured[step], step))
    return {"step": best, name: measured[best]}
