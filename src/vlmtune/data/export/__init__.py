"""A prepared dataset in the forms that other tools read, with its images beside it as files.

A row goes three ways: it is cut to what its form can hold (``fit``), written (``forms``), and read
again as ``prepare`` would read it. What was cut, and every row that does not come back as it was,
is told with its id; nothing is dropped silently.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmtune.data.conversation import Conversation, Image, Text
from vlmtune.data.dataset import PreparedDataset, Rows
from vlmtune.data.export.fit import Loss, check_read_back, fit
from vlmtune.data.export.forms import FORMS, Form
from vlmtune.data.export.place import Pictures, Place, Table
from vlmtune.data.formats import FORMATS, Read, nearest
from vlmtune.data.media import ImagePolicy, read_header
from vlmtune.errors import DataError, RefusedError, UsageError

__all__ = ["FORMS", "SPLITS", "ExportRefusedError", "ExportResult", "export"]

SPLITS = ("train", "validation", "all")
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What ``export`` wrote.

    Attributes:
        path: The table; its images lie beside it.
        rows: Rows written.
        left_out: Rows that are not in the table.
        lost: How many times something could not be written, by code.
        report: The file with the code and the id of each loss; None where nothing was lost.
        read_with: Options of ``prepare`` that read the table again, with its validation rows.
    """

    path: Path
    rows: int
    left_out: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    report: Path | None = None
    read_with: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that ``vlmtune export --json`` prints."""
        return {
            "path": str(self.path),
            "rows": self.rows,
            "left_out": self.left_out,
            "lost": self.lost,
            "report": None if self.report is None else str(self.report),
            "read_with": self.read_with,
        }


class ExportRefusedError(RefusedError):
    """The form cannot hold the rows; ``result`` says what was lost. Nothing was written."""

    code = "not_expressible"

    def __init__(self, message: str, result: ExportResult) -> None:
        super().__init__(message)
        self.result = result


def export(
    dataset: str | Path,
    out: str | Path,
    *,
    format: str,
    split: str = "all",
    strict: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a prepared dataset in a form that other tools read.

    Training rows come first and validation rows last. Equal datasets give equal bytes; what is
    written is there whole or not at all.

    Args:
        dataset: A prepared dataset.
        out: The table (``rows.json``), or a folder for the table and its images.
        format: A name in ``FORMS``.
        split: ``train``, ``validation`` or ``all``.
        strict: Refuse where anything would be lost.
        progress: Called with (rows so far, all rows).

    Raises:
        UsageError: No such dataset, form or split; another ending than the form's; no rows.
        RefusedError: There is something at ``out`` already.
        ExportRefusedError: Something would be lost and ``strict`` is set, or no row can be written.
    """
    form = _form(format)
    opened = PreparedDataset.open(dataset)
    splits = _splits(opened, split)
    total = sum(map(len, splits.values()))
    if not total:
        raise UsageError(f"--split {split}: the dataset {dataset} has no rows there")
    form = form if form.images != 1 or _shows_images(splits) else form.without_images()
    with Place(Path(out), form.endings) as place, Table(place.table) as table:
        work = _Work(place, table, form)
        for number, (name, row) in enumerate(_rows(splits), start=1):
            work.take(name, row)
            if progress is not None:
                progress(number, total)
        result = work.finish()
        _refuse(result, total, format, strict=strict)
        place.publish()
    return result


def _form(name: str) -> Form:
    if name not in FORMS:
        raise UsageError(
            f"--format {name}: no such form{nearest(name, FORMS)}; expected {', '.join(FORMS)}"
        )
    return FORMS[name]


def _splits(dataset: PreparedDataset, asked: str) -> dict[str, Rows]:
    if asked not in SPLITS:
        raise UsageError(f"--split {asked}: expected {', '.join(SPLITS)}{nearest(asked, SPLITS)}")
    names = SPLITS[:2] if asked == "all" else (asked,)
    return {name: dataset.split(name) for name in names}


def _rows(splits: dict[str, Rows]) -> Iterator[tuple[str, Conversation]]:
    for name, rows in splits.items():
        yield from ((name, rows[number]) for number in range(len(rows)))


def _shows_images(splits: dict[str, Rows]) -> bool:
    """Whether any row has an image: almost always the first one tells."""
    return any(row.images for _, row in _rows(splits))


class _Work:
    """Writes rows and keeps account of what is lost."""

    def __init__(self, place: Place, table: Table, form: Form) -> None:
        self._place, self._table, self._form = place, table, form
        self._pictures = Pictures(place.images, place.images_name)
        self._read: Read | None = None
        self._losses: Counter[str] = Counter()
        self._left_out = 0
        self._written: Counter[str] = Counter()
        self._trained: set[str] = set()  # pictures of training rows
        # Questions that were cut off: a single one can be given back with --prompt.
        self._questions: set[str | None] = set()

    def take(self, split: str, row: Conversation) -> None:
        losses: list[Loss] = []
        try:
            fields = self._written_as(split, row, losses)
        except DataError as fault:
            self._left_out += 1
            self._tell(split, row.id, Loss(fault.code, str(fault)), left_out=True)
            return
        for loss in losses:
            self._tell(split, row.id, loss, left_out=False)
        if not self._form.questions and len(self._questions) < 2:
            self._questions.add(_appended(row))
        self._pictures.save()
        self._table.add(fields)
        self._written[split] += 1

    def _written_as(self, split: str, row: Conversation, losses: list[Loss]) -> dict[str, Any]:
        headers = [read_header(image.data, ImagePolicy()) for image in row.images]
        sizes = [header.size for header in headers]
        cut = fit(row, self._form, sizes, losses)
        paths = self._pictures.names(row, [header.format for header in headers])
        fields = self._form.write(cut, paths, sizes)
        # A table's reader finds its columns in the first row; all rows have the same.
        read = self._read or FORMATS[self._form.reader].reader([fields], {})
        check_read_back(read(fields), cut, paths, sizes)
        self._read = read
        self._note_split(split, paths, losses)
        return fields

    def _note_split(self, split: str, paths: list[str], losses: list[Loss]) -> None:
        """``prepare`` never divides rows that share a picture: such a split does not come back."""
        if split == "train":
            self._trained.update(paths)
        elif not self._trained.isdisjoint(paths):
            losses.append(
                Loss(
                    "split", "its picture is in the training split too: prepare keeps both together"
                )
            )

    def _tell(self, split: str, identity: str, loss: Loss, *, left_out: bool) -> None:
        self._losses[loss.code] += 1
        entry = {
            "id": identity,
            "split": split,
            "code": loss.code,
            "row": "left out" if left_out else "written",
            "message": loss.message,
        }
        # ASCII only: a line break or a direction mark in a row must not reach a terminal.
        self._place.tell(json.dumps(entry) + "\n")

    def finish(self) -> ExportResult:
        self._table.finish()
        read_with: dict[str, Any] = {"format": self._form.reader}
        if self._written["train"] and self._written["validation"]:
            read_with["validation"] = self._written["validation"]
        if len(self._questions) == 1 and None not in self._questions:
            (read_with["prompt"],) = self._questions
        return ExportResult(
            path=self._place.final_table,
            rows=self._written.total(),
            left_out=self._left_out,
            lost=dict(sorted(self._losses.items())),
            report=self._place.final_report if self._losses else None,
            read_with=read_with,
        )


def _appended(row: Conversation) -> str | None:
    """The question, where it stands as ``prepare --prompt`` would put it: behind the image."""
    match row.messages[0].content:
        case (Image(), Text(question)):
            return question
        case _:
            return None


def _refuse(result: ExportResult, total: int, format: str, *, strict: bool) -> None:
    if result.rows and not (strict and result.lost):
        return
    codes = ", ".join(f"{code} {count}" for code, count in result.lost.items())
    nothing = replace(result, report=None)
    if not result.rows:
        raise ExportRefusedError(
            f"none of the {total} rows can be written as {format} ({codes}); choose a form that "
            "holds them, see docs/export.md",
            nothing,
        )
    raise ExportRefusedError(
        f"{format} cannot hold everything of the {total} rows ({codes}), and --strict is set; "
        "without it the rest is written, with a report that names each row",
        nothing,
    )
