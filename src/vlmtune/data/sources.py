"""Where raw rows come from: tables, shards, folders, globs, hubs. Rows are not interpreted here."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from vlmtune.data.layouts import rows_of_classes
from vlmtune.data.records import Fault, FieldError, Record, Source
from vlmtune.data.shards import read_tar
from vlmtune.data.tables import (
    open_parquet,
    read_arrow,
    read_csv,
    read_json,
    read_jsonl,
    read_parquet,
)
from vlmtune.errors import FormatError, UsageError

__all__ = [
    "Fault",
    "FieldError",
    "Record",
    "Source",
    "hub_records",
    "looks_like_hub_id",
    "open_local",
]

# Takes a file and the name that its rows are called by.
Reader: TypeAlias = Callable[[Path, str], Iterator[Record]]

READERS: dict[str, Reader] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".tar": read_tar,
    ".tar.gz": read_tar,
    ".tgz": read_tar,
}
# Several files with one of these endings in a folder are parts of one table.
IN_PARTS = (".parquet", ".arrow", ".feather", ".tar", ".tar.gz", ".tgz")


def open_local(path: Path) -> Source:
    """Rows of a table, of the table(s) in a folder, or of all tables that a glob names.

    Files are read in the order of their names.

    Raises:
        UsageError: There is nothing at ``path``.
        FormatError: It is no table, or the folder's table is not clear, or text is not UTF-8.
    """
    if not path.exists():
        files = _files_of_glob(path)
    elif not path.is_dir():
        files = [path]
    elif not _tables(path) and (count := sum(1 for _ in rows_of_classes(path))):
        classes = (Record(row["file_name"], row, path) for row in rows_of_classes(path))
        return Source(str(path), classes, count)
    else:
        files = _tables_in(path)
    readers = [_reader_of(file) for file in files]
    streams = (reader(*file) for file, reader in zip(_named(files), readers, strict=True))
    total = None
    if all(_ending(file) == ".parquet" for file in files):
        total = sum(_rows_of_parquet(file) for file in files)
    return Source(str(path), (record for stream in streams for record in stream), total)


def _files_of_glob(path: Path) -> list[Path]:
    """The files that ``shots/*.jsonl`` means; ``**`` reaches into all folders below.

    Raises:
        UsageError: ``path`` is no pattern, or none.
    """
    pattern = str(path)
    if not glob.has_magic(pattern):
        raise UsageError(
            f"the source {path} does not exist; expected a table, a folder, a pattern such as "
            "'rows/*.jsonl', or a hub's id"
        )
    names = sorted(glob.iglob(pattern, recursive=True))  # noqa: PTH207 - it may be absolute
    files = [file for file in map(Path, names) if not file.is_dir()]
    if not files:
        raise UsageError(
            f"no file matches {pattern}; expected tables ({', '.join(READERS)}). Put the pattern "
            "in quotes, so that the shell leaves it alone"
        )
    return files


def _named(files: list[Path]) -> Iterator[tuple[Path, str]]:
    """Each file with its name, or where names repeat its path below the folder common to all."""
    unique = len({file.name for file in files}) == len(files)
    root = None if unique else os.path.commonpath([file.parent for file in files])
    for file in files:
        yield file, file.name if root is None else file.relative_to(root).as_posix()


def _rows_of_parquet(file: Path) -> int:
    with open_parquet(file) as opened:
        return int(opened.metadata.num_rows)


def _ending(file: Path) -> str:
    name = file.name.lower()
    return ".tar.gz" if name.endswith(".tar.gz") else file.suffix.lower()


def _tables(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _ending(file) in READERS)


def _tables_in(folder: Path) -> list[Path]:
    """The table that describes a folder of images; several parquet files count as one table."""
    tables = _tables(folder)
    named = [file for file in tables if file.stem == "metadata"]
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        # What ``Dataset.save_to_disk`` of Hugging Face wrote.
        named = [file for file in tables if _ending(file) == ".arrow"]
    chosen = named or tables
    if not chosen:
        raise FormatError(
            f"the folder {folder} holds no table ({', '.join(READERS)}) and no folders of classes; "
            "expected a table that names each image and its text, e.g. metadata.csv with the "
            "columns file_name,text, or images in a folder for each class"
        )
    endings = {_ending(file) for file in chosen}
    if len(chosen) > 1 and not (len(endings) == 1 and endings.issubset(IN_PARTS)):
        raise FormatError(
            f"the folder {folder} holds several tables: {', '.join(file.name for file in chosen)}. "
            "Name the one you mean as the source, or several with a pattern such as "
            f"'{folder}/*.jsonl'"
        )
    return chosen


def _reader_of(file: Path) -> Reader:
    reader = READERS.get(_ending(file))
    if reader is None:
        raise FormatError(
            f"{file} has the ending {file.suffix!r}; expected one of {', '.join(READERS)}"
        )
    if not file.is_file():
        raise FormatError(f"{file} is not a regular file")
    return reader


def looks_like_hub_id(source: str) -> bool:
    """``owner/name``, and not a path to a table."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) is not None
        and _ending(Path(source)) not in READERS
    )


def hub_records(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Record]:
    """Rows of a hub's data set; their images are bytes, so that no path is ever followed."""
    for number, fields in enumerate(rows, start=1):
        yield Record(f"{name}:{number}", fields, None)
