"""Readers of tables: CSV, TSV, JSON, JSON lines, parquet, Arrow.

A reader takes a file and the name that its rows are called by, and yields the rows. All but JSON
read as they go; a JSON list is in memory as a whole.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune.data.cells import restored
from vlmtune.data.layouts import rows_of_document
from vlmtune.data.records import Fault, Record
from vlmtune.errors import FormatError

# Rows that are Python objects at once, while their batch lies in the file.
BATCH = 16
MAX_LINE_BYTES = 512 * 2**20
# Python's own tools stop somewhere near 1,000; no format nests deeper than ten.
MAX_DEPTH = 64


def read_csv(path: Path, name: str) -> Iterator[Record]:
    """Rows of a CSV or TSV file whose first line names the columns.

    Raises:
        FormatError: Not UTF-8, no usable header, a quote that is never closed.
    """
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
                raise _not_utf8(path, name, wrong) from None
            except csv.Error as wrong:
                if "unexpected end" in str(wrong):
                    raise FormatError(
                        f"{name}:{line}: a quote opened here is never closed, so that the "
                        "rest of the file would be one cell; close it or double it"
                    ) from None
                fault = Fault("bad_row", f"not readable as CSV: {wrong}")
            where, line = f"{name}:{line}", rows.line_num + 1
            if header is None:
                header = _checked_header(path, cells, fault)
            elif cells or fault:
                yield _csv_record(where, header, cells, path.parent, fault)
    if header is None:
        raise FormatError(f"{path} is empty; expected a first line with the columns' names")


def _checked_header(path: Path, cells: list[str], fault: Fault | None) -> list[str]:
    if fault is not None:
        raise FormatError(f"{path}: the first line, with the columns' names, is {fault.message}")
    header = [cell.strip() for cell in cells]
    double = sorted({name for name in header if header.count(name) > 1})
    if double:
        raise FormatError(f"{path}: several columns are called {', '.join(map(repr, double))}")
    return header


def _csv_record(
    where: str, header: list[str], cells: list[str], base: Path, fault: Fault | None
) -> Record:
    if fault is None and len(cells) != len(header):
        fault = Fault(
            "bad_row",
            f"the row has {len(cells)} cells, the header {len(header)}; quote cells that contain "
            "the separator or line breaks",
        )
    if fault is not None:
        return Record(where, {"cells": cells}, base, fault)
    return Record(where, restored(dict(zip(header, cells, strict=True))), base)


def read_jsonl(path: Path, name: str) -> Iterator[Record]:
    """Rows of a file whose every line is a JSON object; empty lines are none."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            where = f"{name}:{number}"
            if len(raw) > MAX_LINE_BYTES:
                _skip_line(file)
                fault = Fault("bad_json", f"the line has more than {MAX_LINE_BYTES:,} bytes")
                yield Record(where, {"line": _as_text(raw[:1000])}, path.parent, fault)
                continue
            if not raw.strip():
                continue
            try:
                fields = json.loads(raw.decode("utf-8"))
            except (ValueError, RecursionError) as wrong:
                fault = Fault("bad_json", f"the line is not valid JSON: {first_line(wrong)}")
                yield Record(where, {"line": _as_text(raw).rstrip()}, path.parent, fault)
                continue
            yield json_record(where, fields, path.parent)


def _skip_line(file: IO[bytes]) -> None:
    while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
        pass


def _as_text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def read_json(path: Path, name: str) -> Iterator[Record]:
    """Rows of a JSON list of objects, or of COCO's document.

    Raises:
        FormatError: It is something else.
    """
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as wrong:
        raise _not_utf8(path, name, wrong) from None
    except (ValueError, RecursionError) as wrong:
        raise FormatError(
            f"{path} is not valid JSON: {first_line(wrong)}; if every line is an object of its "
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
        yield json_record(f"{name}[{number}]", fields, path.parent)


def json_record(where: str, fields: Any, base: Path | None) -> Record:
    """A row that stood in JSON."""
    if is_too_deep(fields):
        fault = Fault("bad_row", f"the row nests lists or objects more than {MAX_DEPTH} deep")
        return Record(where, {}, base, fault)
    if isinstance(fields, dict):
        return Record(where, fields, base)
    fault = Fault("bad_row", f"the row is a JSON {type(fields).__name__}, expected an object")
    return Record(where, {"row": fields}, base, fault)


def is_too_deep(value: Any) -> bool:
    """Whether a value nests deeper than ``MAX_DEPTH``."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for found in level:
            if isinstance(found, dict):
                below.extend(found.values())
            elif isinstance(found, list):
                below.extend(found)
        if not below:
            return False
        level = below
    return True


def first_line(fault: Exception) -> str:
    """A library's own words, as far as they fit into ours."""
    return str(fault).split("\n", 1)[0]


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file.

    Raises:
        FormatError: It is none.
    """
    try:
        return pq.ParquetFile(path, buffer_size=2**20)  # else a row group at once
    except (pa.ArrowException, OSError) as wrong:
        raise FormatError(f"{path} is not readable as parquet: {first_line(wrong)}") from None


def read_parquet(path: Path, name: str) -> Iterator[Record]:
    """Rows of a parquet file.

    Raises:
        FormatError: It is damaged.
    """
    number = 0
    try:
        with open_parquet(path) as file:
            for batch in file.iter_batches(batch_size=BATCH, use_threads=False):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(f"{name}:{number}", fields, path.parent)
    except (pa.ArrowException, OSError) as wrong:
        raise _damaged(path, number, "parquet", wrong) from None


def read_arrow(path: Path, name: str) -> Iterator[Record]:
    """Rows of an Arrow file (feather) or stream, as ``datasets`` saves them.

    Raises:
        FormatError: It is damaged.
    """
    number = 0
    try:
        with pa.memory_map(str(path)) as file:
            for batch in _batches(file):
                for start in range(0, len(batch), BATCH):
                    rows = batch.slice(start, BATCH)
                    rows.validate(full=True)  # offsets that lead elsewhere would be followed
                    for fields in rows.to_pylist():
                        number += 1
                        yield Record(f"{name}:{number}", fields, path.parent)
    except (pa.ArrowException, OSError) as wrong:
        raise _damaged(path, number, "Arrow", wrong) from None


def _batches(file: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    magic = file.read(6)
    file.seek(0)
    if magic == b"ARROW1":
        with pa.ipc.open_file(file) as reader:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)
    else:
        with pa.ipc.open_stream(file) as stream:
            yield from stream


def _damaged(path: Path, number: int, kind: str, wrong: Exception) -> FormatError:
    return FormatError(
        f"{path}: row {number + 1} or one soon after is not readable as {kind}: {first_line(wrong)}"
    )


def _not_utf8(path: Path, name: str, wrong: UnicodeDecodeError) -> FormatError:
    """Name the line: the decoder only knows the position in its buffer."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as exact:
                found = line[exact.start : exact.start + 4]
                return FormatError(
                    f"{name}:{number} is not UTF-8 (found the bytes {found!r}); convert the "
                    f"file first, e.g. iconv -f GB18030 -t UTF-8 {path.name}"
                )
    return FormatError(f"{path} is not UTF-8: {wrong}")
