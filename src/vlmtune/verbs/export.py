"""``export``: a prepared dataset in a form that other tools read."""

from __future__ import annotations

from pathlib import Path

from vlmtune.data.export import ExportResult
from vlmtune.data.export import export as write
from vlmtune.verbs.observer import Observer


def export(
    dataset: str | Path,
    out: str | Path,
    *,
    format: str,
    split: str = "all",
    strict: bool = False,
    observer: Observer | None = None,
) -> ExportResult:
    """Write a prepared dataset as csv, tutorial-ocr, qwen, llava, trl, …, with its images beside.

    Args:
        dataset: A prepared dataset.
        out: The table (``rows.json``), or a folder for the table and its images.
        format: A name in ``vlmtune.data.export.FORMS``.
        split: ``train``, ``validation`` or ``all``.
        strict: Refuse where anything would be lost; otherwise it is told in the result.
        observer: Who is told how it goes.

    Raises:
        UsageError: No such dataset, form or split; another ending than the form's; no rows.
        RefusedError: There is something at ``out`` already, or ``strict`` and something is lost.
    """
    observer = observer or Observer()
    observer.stage(f"exporting {dataset} as {format}")
    return write(
        dataset, out, format=format, split=split, strict=strict, progress=observer.progress
    )
