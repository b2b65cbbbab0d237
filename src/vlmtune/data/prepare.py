"""Raw rows to a prepared dataset: every row that came in is kept or stands in the quarantine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.formats import Detection, detect, nearest
from vlmtune.data.options import PrepareOptions
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.records import Record, Source, size_of
from vlmtune.data.sorting import Sorter
from vlmtune.data.sources import hub_records, looks_like_hub_id, open_local
from vlmtune.data.splits import rows_marked, rows_taken
from vlmtune.data.work import Task
from vlmtune.data.workers import worked
from vlmtune.data.writer import DatasetWriter, write_json
from vlmtune.errors import FormatError, RefusedError, TooManyBadRowsError

__all__ = ["PrepareOptions", "PrepareRefusedError", "PrepareResult", "RowCounts", "prepare"]

Progress = Callable[[int, int | None], None]

# Rows looked at to tell the format and the columns.
SAMPLE = 100
SAMPLE_BYTES = 32 * 2**20
LEFT_BY_A_REFUSAL = ("quarantine.jsonl", "summary.json")


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
        notes: What else the user should know.
        already_made: The dataset was there, and is what would have been made.
    """

    path: Path
    rows: RowCounts
    splits: dict[str, int]
    fingerprint: str
    quarantine: dict[str, int]
    detection: Detection
    notes: tuple[str, ...] = ()
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
            "notes": list(self.notes),
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
    """Make a prepared dataset of tables, tar shards, a folder of them, or a hub's data set.

    Every image is decoded once, so that training meets none that fails. The dataset appears at
    ``out`` when it is complete; too many bad rows leave only ``quarantine.jsonl`` and
    ``summary.json`` there.

    Args:
        source: Path of a table, a shard or a folder; a pattern such as ``rows/*.jsonl``; or
            ``owner/name``.
        out: Folder of the dataset.
        options: See ``PrepareOptions``.
        progress: Called with (rows so far, all rows if known).

    Raises:
        UsageError: No such source; an option that does not fit it; no rows.
        FormatError: The form is unknown or unclear, a column is missing.
        PrepareRefusedError: More bad rows than ``max_bad``, or not one good row.
        RefusedError: ``out`` holds something else, or an archive is dangerous.
        WorkerDiedError: A process was killed; nothing was written.
    """
    options = options or PrepareOptions()
    path = Path(out)
    existing = _existing(path, options)
    raw = _open_source(source, options)
    records, task, detection = _with_task(raw, options)
    progress = progress or (lambda _done, _total: None)
    with DatasetWriter(path) as writer:
        with Quarantine(writer.folder / "quarantine.jsonl") as quarantine:
            sorter = Sorter(writer, quarantine, task.format)
            total = raw.total if options.limit is None else options.limit
            # Closed here: after an interrupt its processes would live as long as the traceback.
            with closing(worked(task, records, options.workers)) as portions:
                for taken, outcome in portions:
                    sorter.take(taken, outcome)
                    done = len(writer) + len(quarantine)
                    for number in range(done - len(taken) + 1, done + 1):
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
        validation, notes = _validation_rows(options, sorter)
        name = raw.name if raw.revision is None else f"{raw.name}@{raw.revision}"
        info = writer.finish(validation, name, options.recorded())
        result = replace(result, splits=info.splits, fingerprint=info.fingerprint, notes=notes)
        if existing is not None:
            return _same_or_refused(existing, result)
        _write_summary(writer.folder, result, options)
        writer.publish(replacing=LEFT_BY_A_REFUSAL)
    return result


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


def _with_task(source: Source, options: PrepareOptions) -> tuple[Iterator[Record], Task, Detection]:
    """All records, what is to be done with each, as the first ones tell, and why that."""
    records = itertools.islice(source.records, options.limit)
    first, size = list[Record](), 0
    while len(first) < SAMPLE and size < SAMPLE_BYTES and (record := next(records, None)):
        first.append(record)
        size += size_of(record.fields)
    if not first:
        raise FormatError(f"the source {source.name} has no rows")
    sample = [_light(record.fields) for record in first if record.fault is None]
    if not sample:
        fault = first[0].fault
        raise FormatError(
            f"none of the first {len(first)} rows of {source.name} can be read; "
            f"{first[0].where}: {fault.message if fault else ''}"
        )
    found = list(dict.fromkeys(key for row in sample for key in row))
    if options.split_column is not None and options.split_column not in found:
        raise FormatError(
            f"--split-by {options.split_by}: there is no column {options.split_column!r}"
            f"{nearest(options.split_column, found)}; found {', '.join(found)}"
        )
    detection = detect(sample, options.format, options.columns)
    task = Task(detection.name, sample, options)
    return itertools.chain(first, records), task, detection


def _light(value: Any) -> Any:
    """A row for looking at: its images are not needed for that, only that they are bytes."""
    match value:
        case bytes() | bytearray():
            return bytes(value[:16])
        case Mapping():
            return {key: _light(cell) for key, cell in value.items()}
        case list() | tuple():
            return [_light(cell) for cell in value]
    return value


def _validation_rows(options: PrepareOptions, sorter: Sorter) -> tuple[set[int], tuple[str, ...]]:
    """The positions of the validation rows, and what the user should know about the rows."""
    notes = []
    if sorter.renamed:
        notes.append(
            f"{sorter.renamed:,} rows have an id that an earlier, different row has, as is usual "
            "in this format; they are called id#2, id#3, …"
        )
    if options.split_column is not None:
        rows = rows_marked(sorter.splits)
    else:
        by, seed = options.split_by, options.seed
        rows = rows_taken(options.validation, by, seed, sorter.ids, sorter.groups)
        if by == "random" and options.validation >= 1 and len(rows) < options.validation:
            notes.append(f"{len(rows):,} validation rows: rows that share an image stay together")
        if by == "last" and options.validation >= 1 and len(rows) > options.validation:
            more = len(rows) - int(options.validation)
            notes.append(
                f"{len(rows):,} validation rows: {more:,} more than asked for show an image of the "
                "last ones, and no image stands on both sides"
            )
    if astride := sorter.groups.astride(rows):
        notes.append(
            f"{astride:,} train rows show an image that is in the validation split too; "
            "--split-by random or last keeps such rows together"
        )
    return rows, tuple(notes)


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
    recorded = {**PrepareOptions().recorded(), **dataset.info.options}
    differing = [name for name, value in options.recorded().items() if recorded.get(name) != value]
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
            "notes": list(result.notes),
            "max_bad": options.max_bad,
            "splits": result.splits,
            "fingerprint": result.fingerprint,
        },
    )
