"""Which checkpoint stands for a run: the best where its recipe says by what, else the newest.

A run is continued from its newest checkpoint; evaluated, merged and served is this one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlmtune.errors import CheckpointError
from vlmtune.runs.checkpoints import checkpoints, faults, newest_good, step_name
from vlmtune.runs.folder import RunFolder

logger = logging.getLogger(__name__)

PROBE_LOSS = "probe_loss"  # what a step is best by where no metric is named


def best_by(evaluation: Mapping[str, Any]) -> str | None:
    """What the best checkpoint of a recipe's ``evaluation`` is best by; None: the newest counts."""
    named = evaluation.get("best_metric")
    if named is None and evaluation.get("stop_after") is not None:
        return PROBE_LOSS
    return None if named is None else str(named)


def best_step(run: RunFolder) -> int | None:
    """The step whose checkpoint stands for a run instead of the newest; nothing is verified.

    None where the recipe says nothing of it, and before the first measurement.
    """
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    name = best_by(recipe.get("evaluation") or {})
    if name is None:
        return None
    for checkpoint in reversed(checkpoints(run.checkpoints)):
        try:
            state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # damaged: an earlier one knows less, and still something
        # A best step by another metric, of before the recipe was changed, is none.
        found = state.get("best_step") if state.get("best_by") == name else None
        return None if found is None else int(found)
    return None


def best_checkpoint(run: RunFolder) -> Path | None:
    """The undamaged checkpoint of ``best_step``; None where the newest stands for the run.

    Raises:
        CheckpointError: It is damaged. Another one is not what was measured as the best.
    """
    step = best_step(run)
    if step is None:
        return None
    path = run.checkpoints / step_name(step)
    if not path.is_dir():
        logger.warning(
            "%s: the best step is %d, whose checkpoint is not there; the newest is used", run, step
        )
        return None
    if problems := faults(path):
        raise CheckpointError(
            f"{path}, the best checkpoint of the run, is damaged ({'; '.join(problems[:3])}). "
            f"Name another one instead of the run: {run.checkpoints}/step-…"
        )
    return path


def chosen_checkpoint(run: RunFolder) -> Path:
    """The checkpoint that stands for a run: verified.

    Raises:
        CheckpointError: If it has none yet, or what there is is damaged.
    """
    chosen = best_checkpoint(run) or newest_good(run.checkpoints)
    if chosen is None:
        raise CheckpointError(
            f"{run} has no checkpoint yet; continue it with `vlmtune train … --run {run} --resume`"
        )
    return chosen
