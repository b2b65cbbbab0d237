"""Where raw rows come from: tables, folders with a table, hubs. Rows are not interpreted here."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune.data.layouts import rows_of_classes, rows_of_document
from vlmtune.errors import FormatError, RowError, UsageError


class FieldError(RowError):
    """A row's fault together with what quarantine tells about it.

    Args:
        code: Stable name of the fault.
        message: What, found, expected, next step.
        field: The column or key at fault.
        value: What stood there.
        data: The image's bytes, where they were read.
    """

    def __init__(
        self, code: str, message: str, *, field: str = "", value: Any = None, data: bytes = b""
    ) -> None:
        super().__init__(code, message)
        self.field = field
        self.value = value
        self.data = data


@dataclass(frozen=True, slots=True)
class Record:
    """A raw row.

    Attributes:
        where: Its place, e.g. ``table.csv:17`` (line) or ``list.json[16]``.
        fields: Its cells by column.
        base: The folder that relative paths in it start from; None for rows of a hub.
        fault: Why it could not even be read; ``fields`` then hold what there was.
    """

    where: str
    fields: Mapping[str, Any]
    base: Path | None
    fault: RowError | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Raw rows in their order.

    Attributes:
        name: As the user gave it, for the record.
        records: The rows, once.
        total: How many there will be, where that is known beforehand.
        revision: A hub's resolved commit.
    """

    name: str
    records: Iterator[Record]
    total: int | None = None
    revision: str | None = None


def open_local(path: Path) -> Source:
    """Rows of a table, or of the table(s) in a folder.

    Raises:
        UsageError: There is nothing at ``path``.
        FormatError: It is no table, or the folder's table is not clear, or text is not UTF-8.
    """
    if not path.exists():
        raise UsageError(
            f"the source {path} does not exist; expected a table, a folder or a hub's id"
        )
    if path.is_dir() and not _has_table(path) and (rows := list(rows_of_classes(path))):
        classes = (Record(row["file_name"], row, path) for row in rows)
        return Source(str(path), classes, len(rows))
    files = _tables_in(path) if path.is_dir() else [path]
    readers = [_reader_of(file) for file in files]
    streams = [reader(file) for file, reader in zip(files, readers, strict=True)]
    total = None
    if all(file.suffix == ".parquet" for file in files):
        total = sum(_open_parquet(file).metadata.num_rows for file in files)
    return Source(str(path), (record for stream in streams for record in stream), total)


def _has_table(folder: Path) -> bool:
    return any(file.suffix.lower() in READERS for file in folder.iterdir())


def _tables_in(folder: Path) -> list[Path]:
    """The table that describes a folder of images; several parquet files count as one table."""
    tables = sorted(file for file in folder.iterdir() if file.suffix.lower() in READERS)
    named = [file for file in tables if file.stem == "metadata"]
    chosen = named or tables
    if not chosen:
        raise FormatError(
            f"the folder {folder} holds no table ({', '.join(READERS)}) and no folders of classes; "
            "expected a table that names each image and its text, e.g. metadata.csv with the "
            "columns file_name,text, or images in a folder for each class"
        )
    if len(chosen) > 1 and any(file.suffix.lower() != ".parquet" for file in chosen):
        raise FormatError(
            f"the folder {folder} holds several tables: {', '.join(file.name for file in chosen)}. "
            "Name the one you mean as the source"
        )
    return chosen


def _reader_of(file: Path) -> Callable[[Path], Iterator[Record]]:
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise FormatError(
            f"{file} has the ending {file.suffix!r}; expected one of {', '.join(READERS)}"
        )
    if not file.is_file():
        raise FormatError(f"{file} is not a regular file")
    return reader


def _read_csv(path: Path) -> Iterator[Record]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Strict: otherwise a quote that is never closed swallows the rest of the file as one cell.
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        line = 1
        while True:
            fault, cells = None, []
            try:
                cells = next(rows)
            except StopIteration:
                break
            except UnicodeDecodeError as wrong:
                raise _not_utf8(path, wrong) from None
            except csv.Error as wrong:
                if "unexpected end" in str(wrong):
                    raise FormatError(
                        f"{path.name}:{line}: a quote opened here is never closed, so that the "
                        "rest of the file would be one cell; close it or double it"
                    ) from None
                fault = RowError("bad_row", f"not readable as CSV: {wrong}")
            where, line = f"{path.name}:{line}", rows.line_num + 1
            if header is None:
                header = _checked_header(path, cells, fault)
            elif cells or fault:
                yield _csv_record(where, header, cells, path.parent, fault)
    if header is None:
        raise FormatError(f"{path} is empty; expected a first line with the columns' names")


def _checked_header(path: Path, cells: list[str], fault: RowError | None) -> list[str]:
    if fault is not None:
        raise FormatError(f"{path}: the first line, with the columns' names, is {fault}")
    header = [cell.strip() for cell in cells]
    double = sorted({name for name in header if header.count(name) > 1})
    if double:
        raise FormatError(f"{path}: several columns are called {', '.join(map(repr, double))}")
    return header


def _csv_record(
    where: str, header: list[str], cells: list[str], base: Path, fault: RowError | None
) -> Record:
    if fault is None and len(cells) != len(header):
        fault = RowError(
            "bad_row",
            f"the row has {len(cells)} cells, the header {len(header)}; quote cells that contain "
            "the separator or line breaks",
        )
    if fault is not None:
        return Record(where, {"cells": cells}, base, fault)
    return Record(where, dict(zip(header, cells, strict=True)), base)


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            where, text = f"{path.name}:{number}", raw.decode("utf-8", "backslashreplace").rstrip()
            try:
                fields = json.loads(raw.decode("utf-8"))
            except (ValueError, RecursionError) as wrong:
                fault = RowError("bad_json", f"the line is not valid JSON: {_first_line(wrong)}")
                yield Record(where, {"line": text}, path.parent, fault)
                continue
            yield _json_record(where, fields, path.parent)


def _read_json(path: Path) -> Iterator[Record]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as wrong:
        raise _not_utf8(path, wrong) from None
    except (ValueError, RecursionError) as wrong:
        raise FormatError(
            f"{path} is not valid JSON: {_first_line(wrong)}; if every line is an object of its "
            "own, call it .jsonl"
        ) from None
    if isinstance(rows, dict):
        joined = rows_of_document(rows)
        rows = rows if joined is None else joined
    if not isinstance(rows, list):
        raise FormatError(
            f"{path} holds a JSON {type(rows).__name__}; expected a list of objects, or COCO's "
            "'images' and 'annotations'"
        )
    for number, fields in enumerate(rows):
        yield _json_record(f"{path.name}[{number}]", fields, path.parent)


def _json_record(where: str, fields: Any, base: Path) -> Record:
    if isinstance(fields, dict):
        return Record(where, fields, base)
    fault = RowError("bad_row", f"the row is a JSON {type(fields).__name__}, expected an object")
    return Record(where, {"row": fields}, base, fault)


def _first_line(fault: Exception) -> str:
    return str(fault).split("\n", 1)[0]


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except pa.ArrowException as wrong:
        raise FormatError(f"{path} is not readable as parquet: {_first_line(wrong)}") from None


def _read_parquet(path: Path) -> Iterator[Record]:
    number = 0
    try:
        for batch in _open_parquet(path).iter_batches(batch_size=64, use_threads=False):
            for fields in batch.to_pylist():
                number += 1
                yield Record(f"{path.name}:{number}", fields, path.parent)
    except pa.ArrowException as wrong:
        raise FormatError(
            f"{path}: row {number + 1} or one soon after is not readable as parquet: "
            f"{_first_line(wrong)}"
        ) from None


def _not_utf8(path: Path, wrong: UnicodeDecodeError) -> FormatError:
    """Name the line: the decoder only knows the position in its buffer."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as exact:
                found = line[exact.start : exact.start + 4]
                return FormatError(
                    f"{path.name}:{number} is not UTF-8 (found the bytes {found!r}); convert the "
                    f"file first, e.g. iconv -f GB18030 -t UTF-8 {path.name}"
                )
    return FormatError(f"{path} is not UTF-8: {wrong}")


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def looks_like_hub_id(source: str) -> bool:
    """``owner/name``, and not a path to a table."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) is not None
        and Path(source).suffix.lower() not in READERS
    )


def hub_records(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Record]:
    """Rows of a hub's data set; their images are bytes, so that no path is ever followed."""
    for number, fields in enumerate(rows, start=1):
        yield Record(f"{name}:{number}", fields, None)
