"""``report``: a run's report and model card, made again from what lies in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtune.errors import RefusedError, UsageError
from vlmtune.evaluation.report import write_report
from vlmtune.runs.folder import RunFolder
from vlmtune.runs.state import damaged_files
from vlmtune.training.summary import report_content, write_summary


def report(
    run: str | Path, *, out: str | Path | None = None, slices: Sequence[str] = ()
) -> dict[str, Any]:
    """Write a run's report.

    Args:
        run: The run's folder.
        out: A file for the report alone; None: the run's own ``report.html`` and ``README.md``.
        slices: Columns of the rows' ``meta`` to slice by, as ``meta.KEY``; if none, those that look
            like classes.

    Returns:
        The path of the report, and what it says in the headline: ``report``, ``verdict``,
        ``metric``.

    Raises:
        UsageError: If the folder holds no run, or no evaluated row has a column of ``slices``.
        RefusedError: If the run's files are damaged.
    """
    folder = RunFolder(run)
    if not folder.exists:
        raise UsageError(f"RUN: {run} holds no run (recipe.yaml is missing)")
    damage = damaged_files(folder)
    if damage:
        raise RefusedError(
            f"RUN: {run} is damaged ({damage}); a report would not be true. Copy the file again "
            "from where the run was made"
        )
    file = folder.report
    if out is None:
        content = write_summary(folder, slices)
    else:
        file = Path(out)
        if not file.absolute().parent.is_dir():
            raise UsageError(f"--out: the folder {file.parent} is not there")
        content = report_content(folder, slices)
        write_report(file, content)
    metric = content.metrics[0] if content.metrics else None
    return {"report": str(file), "verdict": content.verdict, "metric": metric}
