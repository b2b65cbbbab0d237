"""Readers of tables: CSV, TSV, JSON, JSON lines, parquet, Arrow. A reader yields a file's rows."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune.data.layouts import rows_of_document
from vlmtune.data.records import Record
from vlmtune.errors import FormatError, RowError


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
