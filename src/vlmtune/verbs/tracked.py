"""What a run's trackers are shown: its options, its steps, its evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmtune.batching.planner import Plan
from vlmtune.data.dataset import Rows
from vlmtune.evaluation.run import Evaluation
from vlmtune.recipe import Recipe
from vlmtune.runs.checkpoints import step_of
from vlmtune.runs.folder import RunFolder
from vlmtune.training.loop import StepReport
from vlmtune.training.optim import learning_rate
from vlmtune.training.tracking.predictions import ROWS, figures, shown
from vlmtune.training.tracking.trackers import Trackers, open_trackers

GIB = 2**30


def track_run(recipe: Recipe, folder: RunFolder, plan: Plan, checkpoint: Path | None) -> Trackers:
    """Opens the trackers that a recipe names, for a run whose folder has been started.

    Args:
        recipe: The run's.
        folder: The run's.
        plan: The run's.
        checkpoint: What the run goes on from; what it told until then stands.
    """
    return open_trackers(
        recipe.tracking,
        folder=folder.path,
        name=folder.path.absolute().name,
        hyperparameters=hyperparameters(recipe, folder, plan),
        begins=0 if checkpoint is None else step_of(checkpoint) + 1,
    )


def hyperparameters(recipe: Recipe, folder: RunFolder, plan: Plan) -> dict[str, Any]:
    """All that decides a run, as it runs: the recipe's every option and what it meets."""
    files = {
        "contract": folder.contract,
        "dataset": folder.data,
        "environment": folder.environment,
    }
    met = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}
    return {
        **recipe.model_dump(mode="json"),
        **met,
        "rows": len(plan.kept),
        "steps": plan.steps,
    }


def track_step(trackers: Trackers, recipe: Recipe, report: StepReport) -> None:
    """Shows a step, unless it is one of those between."""
    due = report.step % recipe.training.log_steps == 0 or report.step in (1, report.steps)
    if due or report.probe_loss is not None:
        trackers.log(report.step, tracked(recipe, report))


def tracked(recipe: Recipe, report: StepReport) -> dict[str, float]:
    """A step's figures for a tracker."""
    values = {
        "train/loss": report.loss,
        "train/learning_rate": report.learning_rate,
        "train/gradient_norm": report.gradient_norm,
        "train/samples_per_second": report.samples / report.seconds,
        "train/tokens_per_second": report.tokens / report.seconds,
        "train/peak_memory_gib": report.peak_memory_bytes / GIB,
    }
    for part, highest in recipe.tuning.learning_rates.named().items():
        rate = learning_rate(recipe.training, report.step, report.steps, highest)
        values[f"train/learning_rate_{part}"] = rate
    if report.probe_loss is not None:
        values["probe/loss"] = report.probe_loss
    return values


def track_evaluation(
    trackers: Trackers,
    recipe: Recipe,
    step: int,
    evaluation: Evaluation,
    validation: Rows,
    *,
    heading: str = "evaluation",
) -> None:
    """Shows an evaluation's metrics, and its first rows with pictures, truths and answers.

    Args:
        trackers: Where to.
        recipe: The run's.
        step: Optimizer steps done.
        evaluation: What was measured.
        validation: Begins with the rows it was measured on; the first are shown each time.
        heading: Of the metrics: those of the probe are not comparable with those of all rows.
    """
    if trackers:
        trackers.log(step, figures(evaluation, heading))
        trackers.show(step, shown(evaluation, validation[:ROWS], recipe.image))
