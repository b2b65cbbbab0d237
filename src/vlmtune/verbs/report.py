"""``report``: a run's report and model card, made again from what lies in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmtune.errors import UsageError
from vlmtune.runs.folder import RunFolder
from vlmtune.training.summary import write_summary


def report(run: str | Path) -> dict[str, Any]:
    """Write ``report.html`` and ``README.md`` of a run.

    Args:
        run: The run's folder.

    Returns:
        The path of the report.

    Raises:
        UsageError: If the folder holds no run.
    """
    folder = RunFolder(run)
    if not folder.exists:
        raise UsageError(f"RUN: {run} holds no run (recipe.yaml is missing)")
    write_summary(folder)
    return {"report": str(folder.report)}
