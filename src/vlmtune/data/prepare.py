"""Raw rows to a prepared dataset: every row that came in is kept or stands in the quarantine."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vlmtune.config import Config
from vlmtune.data.build import Builder
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.formats import FORMATS, Detection, Read, detect, nearest
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sources import (
    FieldError,
    Record,
    Source,
    hub_records,
    looks_like_hub_id,
    open_local,
)
from vlmtune.data.splits import rows_marked, rows_taken, split_of
from vlmtune.data.writer import DatasetWriter, write_json
from vlmtune.errors import (
    DataError,
    FormatError,
    RefusedError,
    TooManyBadRowsError,
)

Progress = Callable[[int, int | None], None]

# Rows looked at to tell the format and the columns.
SAMPLE = 100
LEFT_BY_A_REFUSAL = ("quarantine.jsonl", "summary.json")


class PrepareOptions(Config):
    """The options of ``vlmtune prepare``.

    Attributes:
        format: A name in ``FORMATS``, or auto.
        prompt: Text put behind the image of rows that ask no question themselves.
        columns: Which column is for what, e.g. ``{"image": "scan", "text": "latex"}``.
        validation: Rows of the validation split: a count, or a fraction below 1.
        split_by: last, random, or ``column:NAME``.
        max_bad: Most rows that may be quarantined: a fraction below 1, or a count.
        limit: Only the first so many rows of the source.
        images_root: A folder that images may be in, tried first for relative paths.
        seed: Draws the validation rows (``random``) and the trained one of several answers.
        answer_separator: What separates several answers in one text, e.g. ``&&``.
        hub: Where ``owner/name`` is looked up.
        split: The split to take from a hub's data set.
        subset: The subset (configuration) to take from a hub's data set.
        revision: The revision to take from a hub's data set.
    """

    format: str = "auto"
    prompt: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    validation: int | float = Field(default=0, ge=0)
    split_by: str = "last"
    max_bad: float = Field(default=0.01, ge=0)
    limit: int | None = Field(default=None, gt=0)
    images_root: str | None = None
    seed: int = 0
    answer_separator: str | None = Field(default=None, min_length=1)
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    split: str | None = None
    subset: str | None = None
    revision: str | None = None

    @field_validator("split_by")
    @classmethod
    def _is_a_way_to_split(cls, value: str) -> str:
        if value not in ("last", "random") and not re.fullmatch("column:.+", value):
            raise ValueError(f"{value!r} is no way to split; expected last, random or column:NAME")
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.split_column and self.validation:
            raise ValueError(
                f"split_by {self.split_by} says which rows are validation, so that validation = "
                f"{self.validation} has no meaning; give one of them"
            )
        if self.validation >= 1 and self.validation != int(self.validation):
            raise ValueError(f"validation {self.validation} is neither a count nor a fraction")
        return self

    @property
    def split_column(self) -> str | None:
        """The column that names a row's split, if one does."""
        prefix, _, name = self.split_by.partition(":")
        return name if prefix == "column" else None


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Rows that came in = kept + quarantined."""

    came_in: int
    kept: int
    quarantined: int

    def to_json(self) -> dict[str, int]:
        """With the names used on disk."""
        return {"in": self.came_in, "kept": self.kept, "quarantined": self.quarantined}


@dataclass(frozen=True, slots=True)
class PrepareResult:
    """What ``prepare`` did.

    Attributes:
        path: The dataset.
        rows: What came in and what became of it.
        splits: Rows by split.
        fingerprint: Of the dataset; empty where it was refused.
        quarantine: Quarantined rows by code.
        detection: What the source was taken for.
        already_made: The dataset was there, and is what would have been made.
    """

    path: Path
    rows: RowCounts
    splits: dict[str, int]
    fingerprint: str
    quarantine: dict[str, int]
    detection: Detection
    already_made: bool = False

    def to_json(self) -> dict[str, Any]:
        """The object that ``vlmtune prepare --json`` prints."""
        return {
            "path": str(self.path),
            "rows": self.rows.to_json(),
            "splits": self.splits,
            "fingerprint": self.fingerprint,
            "quarantine": self.quarantine,
            "format": self.detection.to_json(),
        }


class PrepareRefusedError(TooManyBadRowsError):
    """More rows were quarantined than allowed; ``result`` has the counts."""

    def __init__(self, message: str, result: PrepareResult) -> None:
        super().__init__(message)
        self.result = result


def prepare(
    source: str | Path,
    out: str | Path,
    options: PrepareOptions | None = None,
    progress: Progress | None = None,
) -> PrepareResult:
    """Make a prepared dataset of a table, a folder with a table, or a hub's data set.

    Every image is decoded once, so that training meets none that fails. The dataset appears at
    ``out`` when it is complete; too many bad rows leave only ``quarantine.jsonl`` and
    ``summary.json`` there.

    Args:
        source: Path of a table or folder, or ``owner/name``.
        out: Folder of the dataset.
        options: See ``PrepareOptions``.
        progress: Called with (rows so far, all rows if known).

    Raises:
        UsageError: No such source; an option that does not fit it; no rows.
        FormatError: The form is unknown or unclear, a column is missing.
        PrepareRefusedError: More bad rows than ``max_bad``, or not one good row.
        RefusedError: ``out`` holds something else.
    """
    options = options or PrepareOptions()
    path = Path(out)
    existing = _existing(path, options)
    raw = _open_source(source, options)
    records, read, detection = _with_reader(raw, options)
    with DatasetWriter(path) as writer:
        with Quarantine(writer.folder / "quarantine.jsonl") as quarantine:
            work = _Work(writer, quarantine, read, options)
            total = raw.total if options.limit is None else options.limit
            for number, record in enumerate(records, start=1):
                work.take(number, record)
                if progress is not None:
                    progress(number, total)
        result = PrepareResult(
            path=path,
            rows=RowCounts(len(writer) + len(quarantine), len(writer), len(quarantine)),
            splits={"train": 0, "validation": 0},
            fingerprint="",
            quarantine=dict(sorted(quarantine.codes.items())),
            detection=detection,
        )
        _refuse_if_too_bad(result, options, writer, leave_files=existing is None)
        validation = _validation_rows(options, work)
        name = raw.name if raw.revision is None else f"{raw.name}@{raw.revision}"
        info = writer.finish(validation, name, _recorded(options))
        result = replace(result, splits=info.splits, fingerprint=info.fingerprint)
        if existing is not None:
            return _same_or_refused(existing, result)
        _write_summary(writer.folder, result, options)
        writer.publish(replacing=LEFT_BY_A_REFUSAL)
    return result


class _Work:
    """Sorts rows into the dataset or the quarantine."""

    def __init__(
        self, writer: DatasetWriter, quarantine: Quarantine, read: Read, options: PrepareOptions
    ) -> None:
        self._writer, self._quarantine, self._read = writer, quarantine, read
        self._column = options.split_column
        self._builder = Builder(
            options.images_root, options.prompt, options.answer_separator, options.seed
        )
        self._seen: set[str] = set()
        self.ids: list[str] = []
        self.splits: list[str] = []

    def take(self, number: int, record: Record) -> None:
        identity = str(record.fields.get("id") or f"row-{number:06d}")
        try:
            if record.fault is not None:
                raise record.fault
            draft = self._read(record.fields)
            identity = draft.id or f"row-{number:06d}"
            if identity in self._seen:
                raise FieldError(
                    "duplicate_id",
                    f"an earlier row has the id {identity!r} too; ids must be unique",
                    field="id",
                    value=identity,
                )
            split = "train" if self._column is None else split_of(record, self._column)
            conversation = self._builder.build(draft, identity, record.base, record.where)
        except DataError as fault:
            self._quarantine.add(record, identity, fault)
            return
        self._writer.add(conversation)
        self._seen.add(identity)
        self.ids.append(identity)
        self.splits.append(split)


def _open_source(source: str | Path, options: PrepareOptions) -> Source:
    path = Path(source)
    if path.exists() or not looks_like_hub_id(str(source)):
        return open_local(path)
    from vlmtune import hub

    rows, revision = hub.load_dataset_records(
        str(source),
        hub=options.hub,
        subset=options.subset,
        split=options.split,
        revision=options.revision,
        streaming=options.limit is not None,  # not the whole of it for the first rows
    )
    return Source(str(source), hub_records(rows, str(source)), revision=revision)


def _with_reader(
    source: Source, options: PrepareOptions
) -> tuple[Iterator[Record], Read, Detection]:
    """All records, the function that reads them, chosen by the first ones, and why that one."""
    records = itertools.islice(source.records, options.limit)
    first = list(itertools.islice(records, SAMPLE))
    if not first:
        raise FormatError(f"the source {source.name} has no rows")
    sample = [record.fields for record in first if record.fault is None]
    if not sample:
        raise FormatError(
            f"none of the first {len(first)} rows of {source.name} can be read; "
            f"{first[0].where}: {first[0].fault}"
        )
    found = list(dict.fromkeys(key for row in sample for key in row))
    if options.split_column is not None and options.split_column not in found:
        raise FormatError(
            f"--split-by {options.split_by}: there is no column {options.split_column!r}"
            f"{nearest(options.split_column, found)}; found {', '.join(found)}"
        )
    detection = detect(sample, options.format, options.columns)
    read = FORMATS[detection.name].reader(sample, options.columns)
    return itertools.chain(first, records), read, detection


def _validation_rows(options: PrepareOptions, work: _Work) -> set[int]:
    if options.split_column is not None:
        return rows_marked(work.splits)
    return rows_taken(options.validation, options.split_by, options.seed, work.ids)


def _recorded(options: PrepareOptions) -> dict[str, Any]:
    return options.model_dump(mode="json")


def _existing(out: Path, options: PrepareOptions) -> PreparedDataset | None:
    """The dataset that is at ``out`` already.

    Raises:
        RefusedError: It was made otherwise, or there is something else.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise RefusedError(f"{out} is a file; choose another --out")
    names = {entry.name for entry in out.iterdir()}
    if names <= set(LEFT_BY_A_REFUSAL):
        return None
    if "dataset.json" not in names:
        raise RefusedError(
            f"{out} is not empty and holds no prepared dataset; choose another --out"
        )
    dataset = PreparedDataset.open(out)
    recorded = dataset.info.options
    differing = [name for name, value in _recorded(options).items() if recorded.get(name) != value]
    if differing:
        raise RefusedError(
            f"{out} holds a dataset that was prepared with another {', '.join(differing)}; choose "
            "another --out, or remove the old dataset"
        )
    return dataset


def _same_or_refused(existing: PreparedDataset, result: PrepareResult) -> PrepareResult:
    if existing.fingerprint != result.fingerprint:
        raise RefusedError(
            f"{result.path} holds a dataset of other rows (made from {existing.info.source}, "
            f"fingerprint {existing.fingerprint[:12]}…; the source gives "
            f"{result.fingerprint[:12]}…); choose another --out, or remove the old dataset"
        )
    return replace(result, already_made=True)


def _refuse_if_too_bad(
    result: PrepareResult, options: PrepareOptions, writer: DatasetWriter, *, leave_files: bool
) -> None:
    rows = result.rows
    allowed = options.max_bad if options.max_bad >= 1 else options.max_bad * rows.came_in
    if rows.quarantined <= allowed and rows.kept:
        return
    if leave_files:
        _write_summary(writer.folder, result, options)
        result.path.mkdir(parents=True, exist_ok=True)
        for name in LEFT_BY_A_REFUSAL:
            (writer.folder / name).replace(result.path / name)
    codes = ", ".join(f"{code} {count}" for code, count in result.quarantine.items())
    raise PrepareRefusedError(
        f"{rows.quarantined} of {rows.came_in} rows are bad ({codes}), more than --max-bad "
        f"{options.max_bad:g} allows. See {result.path / 'quarantine.jsonl'} for each row and what "
        "to do about it; then mend the source or raise --max-bad",
        result,
    )


def _write_summary(folder: Path, result: PrepareResult, options: PrepareOptions) -> None:
    write_json(
        folder / "summary.json",
        {
            **result.rows.to_json(),
            "quarantine": result.quarantine,
            "format": result.detection.to_json(),
            "max_bad": options.max_bad,
            "splits": result.splits,
            "fingerprint": result.fingerprint,
        },
    )
