"""``runs``: every run of a folder in a table, and compared on one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmtune.errors import UsageError
from vlmtune.evaluation.comparison import RunLine, rankings
from vlmtune.evaluation.comparison_page import comparison_html
from vlmtune.evaluation.run import Evaluation
from vlmtune.files import write_text
from vlmtune.runs.folder import RunFolder
from vlmtune.runs.state import damaged_files
from vlmtune.training.listing import list_runs as found_runs


def list_runs(
    folders: str | Path | Sequence[str | Path] = "runs", *, html: str | Path | None = None
) -> dict[str, Any]:
    """List runs, and compare them on one page.

    Args:
        folders: A run or a folder with runs in it, or several.
        html: A page to write.

    Returns:
        The keys of ``vlmtune runs --json``: ``runs`` and ``html``.

    Raises:
        UsageError: A folder that is not there, or no run at all.
    """
    paths = [folders] if isinstance(folders, str | Path) else list(folders)
    lines = found_runs(paths)
    if html is not None:
        file = Path(html)
        if not file.absolute().parent.is_dir():
            raise UsageError(f"--html: the folder {file.parent} is not there")
        write_text(file, _page(", ".join(map(str, paths)), lines))
    return {
        "runs": [described(line) for line in lines],
        "html": None if html is None else str(html),
    }


def _page(title: str, lines: Sequence[RunLine]) -> str:
    answered: dict[str, Evaluation] = {}
    for line in lines:
        run = RunFolder(line.path)
        if damaged_files(run):
            continue
        evaluation = Evaluation.read(run.evaluation("after"))
        if evaluation is not None:
            answered[line.name] = evaluation
    return comparison_html(f"Runs in {title}", lines, rankings(lines, answered))


def described(line: RunLine) -> dict[str, Any]:
    """A run as JSON has it."""
    before, after = line.before.get(line.metric), line.after.get(line.metric)
    difference = line.difference
    return {
        "name": line.name,
        "path": line.path,
        "state": line.kind,
        "why": line.state,
        "steps": line.step,
        "base": line.base,
        "data": line.data,
        "fingerprint": line.fingerprint,
        "method": line.method,
        "samples": line.samples,
        "seconds": round(line.seconds, 3),
        "samples_per_second": round(line.samples_per_second, 3),
        "metric": line.metric or None,
        "before": None if before is None else asdict(before),
        "after": None if after is None else asdict(after),
        "difference": None
        if difference is None
        else {**asdict(difference), "verdict": difference.verdict},
        "report": line.report or None,
    }
