"""What a run writes down on its way: its ledger and its metrics."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from vlmtune.batching.planner import Step
from vlmtune.files import append_lines

if TYPE_CHECKING:
    from vlmtune.training.loop import Job, StepReport

logger = logging.getLogger(__name__)


def write_step(job: Job, step: Step, report: StepReport) -> None:
    """Ledger and metrics of a step."""
    record = {name: value for name, value in vars(report).items() if name != "steps"}
    if record["probe_metrics"] is None:
        del record["probe_metrics"]
    for name in ("loss", "gradient_norm", "probe_loss"):
        if record[name] is None or not math.isfinite(record[name]):
            del record[name]  # JSON has no NaN; ``applied`` says that the step was left out
    ids = [job.loader.row_id(index) for index in step.rows]
    event = "trained" if report.applied else "skipped_step"
    entry: dict[str, Any] = {"step": step.number, "event": event, "ids": ids}
    if step.answers:
        entry["answers"] = list(step.answers)  # which of its references each row was trained on
    append_lines(job.folder.ledger, [entry])
    append_lines(job.folder.metrics, [record])


def write_proof(job: Job, step: Step) -> None:
    """Write down which parts the first gradients reached, and what remained unseen."""
    rows = job.proof.rows
    parts = [vars(row) for row in rows]
    event = {"step": step.number, "event": "trainability", "parts": parts}
    append_lines(job.folder.ledger, [event])
    for row in rows:
        if row.step is None and row.trainable:
            logger.warning("no step had an image: the %s part did not train", row.part)
    job.on_proof(rows)


def write_end(job: Job) -> None:
    """Say that the training ends before its plan."""
    state, name = job.state, job.watch.best_by
    best = {"best_step": state.best_step, name: state.best_value}
    event = {"step": state.step, "event": "stopped_early", **best}
    append_lines(job.folder.ledger, [event])
    logger.warning(
        "%s has not been better than at step %s in %d measurements: the training ends at step %d "
        "of %d (evaluation.stop_after)",
        name,
        state.best_step,
        state.without_gain,
        state.step,
        job.plan.steps,
    )
