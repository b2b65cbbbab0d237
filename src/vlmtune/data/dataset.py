"""The prepared dataset on disk: written once (see ``writer``), read lazily.

    DIR/
      data/train-00000-of-00001.parquet        rows, images encoded as they came
      data/validation-00000-of-00001.parquet
      dataset.json                             version, source, options, counts, fingerprints, files
      quarantine.jsonl, summary.json           what was left out and why

``datasets.load_dataset(DIR)`` reads the same folder as it stands.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from vlmtune.data.conversation import Conversation
from vlmtune.data.rows import SCHEMA, conversation_to_row, row_to_conversation
from vlmtune.errors import ChangedError, UsageError

__all__ = [
    "FORMAT_VERSION",
    "SCHEMA",
    "DatasetInfo",
    "PreparedDataset",
    "Rows",
    "conversation_to_row",
    "row_to_conversation",
]

FORMAT_VERSION = 1
CACHED_GROUPS = 4


class DataFile(BaseModel):
    """A parquet file of a dataset; ``path`` is relative to the dataset."""

    path: str
    split: str
    rows: int
    bytes: int
    sha256: str


class DatasetInfo(BaseModel):
    """``dataset.json``.

    Attributes:
        fingerprints: By split, over the ordered rows and their images' bytes.
        fingerprint: Over the splits' fingerprints.
        options: What ``prepare`` was called with.
        files: Every parquet file with its hash.
    """

    model_config = ConfigDict(frozen=True)

    format_version: int
    tool_version: str
    source: str
    options: dict[str, Any]
    splits: dict[str, int]
    fingerprints: dict[str, str]
    fingerprint: str
    files: tuple[DataFile, ...]


class Rows(Sequence[Conversation]):
    """Rows by position: map-style, lazy, picklable, safe to use after a fork."""

    @property
    @abstractmethod
    def ids(self) -> list[str]:
        """All ids in order, read without the images."""

    @abstractmethod
    def row(self, position: int) -> Conversation:
        """The row at a position from 0 to the length."""

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return [self.row(position) for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.row(position)


class StoredRows(Rows):
    """The rows of a split. Only the ``CACHED_GROUPS`` row groups used last are in memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = tuple(files)
        self._groups: list[tuple[int, int]] = []  # (file, row group in it)
        self._ends: list[int] = []  # first row after each group
        end = 0
        for number, file in enumerate(self._files):
            with pq.ParquetFile(file, memory_map=True) as parquet:
                metadata = parquet.metadata
                for group in range(metadata.num_row_groups):
                    end += metadata.row_group(group).num_rows
                    self._groups.append((number, group))
                    self._ends.append(end)
        self._forget()

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._open: dict[int, pq.ParquetFile] = {}
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_cache": OrderedDict()}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, position: int) -> Conversation:
        """The row at a position from 0 to the length."""
        number = bisect.bisect_right(self._ends, position)
        start = self._ends[number - 1] if number else 0
        row = self._group(number).slice(position - start, 1).to_pylist()[0]
        return row_to_conversation(row)

    def _group(self, number: int) -> pa.Table:
        if self._owner != os.getpid():  # a forked loader worker must not share readers
            self._forget()
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        file, group = self._groups[number]
        if file not in self._open:
            self._open[file] = pq.ParquetFile(self._files[file], memory_map=True)
        # pyarrow's threads do not survive a fork.
        table = self._open[file].read_row_group(group, use_threads=False)
        self._cache[number] = table
        if len(self._cache) > CACHED_GROUPS:
            self._cache.popitem(last=False)
        return table

    @cached_property
    def ids(self) -> list[str]:
        """All ids in order, read without the images."""
        found = list[str]()
        for path in self._files:
            # Not ``pq.read_table``: for a folder's sake it imports pandas, where that is installed.
            with pq.ParquetFile(path, memory_map=True) as file:
                found += file.read(columns=["id"], use_threads=False)["id"].to_pylist()
        return found


@dataclass(frozen=True, slots=True)
class PreparedDataset:
    """A prepared dataset, opened for reading."""

    path: Path
    info: DatasetInfo

    @classmethod
    def open(cls, path: str | Path) -> PreparedDataset:
        """Open a dataset that ``vlmtune prepare`` wrote.

        Raises:
            UsageError: No prepared dataset, or one of a newer version.
            ChangedError: A parquet file is missing or has another size than when it was written.
        """
        folder = Path(path)
        info = _read_info(folder)
        for file in info.files:
            _check_file(folder, file)
        return cls(folder, info)

    @property
    def fingerprint(self) -> str:
        """Over all rows in their order and the bytes of their images."""
        return self.info.fingerprint

    def split(self, name: str) -> StoredRows:
        """The rows of ``train`` or ``validation``; the latter may be empty.

        Raises:
            UsageError: No split of that name.
        """
        if name not in self.info.splits:
            raise UsageError(
                f"the dataset {self.path} has no split {name!r}; it has "
                + ", ".join(f"{split} ({rows} rows)" for split, rows in self.info.splits.items())
            )
        return StoredRows([self.path / file.path for file in self.info.files if file.split == name])

    def quarantined(self) -> dict[str, int]:
        """Rows that ``prepare`` kept out, by code."""
        path = self.path / "summary.json"
        if not path.is_file():
            return {}
        counts: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))["quarantine"]
        return counts

    def facts(self) -> dict[str, Any]:
        """What a run records of its data."""
        return {
            "path": str(self.path.resolve()),
            "fingerprint": self.fingerprint,
            "source": self.info.source,
            "splits": {"train": 0, "validation": 0, **self.info.splits},
            "quarantined": self.quarantined(),
        }

    def verify(self) -> None:
        """Hash every parquet file again: reads all of the data.

        Raises:
            ChangedError: Naming the file that is not what was written.
        """
        for file in self.info.files:
            if sha256_of(self.path / file.path) != file.sha256:
                raise ChangedError(
                    f"{self.path / file.path} was changed after it was prepared (its sha256 is not "
                    "the one in dataset.json); run `vlmtune prepare` again"
                )


def _read_info(folder: Path) -> DatasetInfo:
    try:
        raw = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        version = raw["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UsageError(
                f"{folder} is a prepared dataset of format version {version}; this vlmtune reads "
                f"version {FORMAT_VERSION}. Upgrade vlmtune or prepare the data again"
            )
        return DatasetInfo.model_validate(raw)
    except (FileNotFoundError, NotADirectoryError):
        found = "it does not exist" if not folder.exists() else "it has no dataset.json"
        raise UsageError(
            f"{folder} is not a prepared dataset: {found}. Make one with: "
            f"vlmtune prepare SOURCE --out {folder}"
        ) from None
    except (ValueError, KeyError, TypeError, ValidationError) as fault:
        raise ChangedError(
            f"{folder / 'dataset.json'} is not what vlmtune wrote "
            f"({type(fault).__name__}: {fault}); prepare the data again"
        ) from None


def _check_file(folder: Path, file: DataFile) -> None:
    path = folder / file.path
    if not path.is_file():
        raise ChangedError(
            f"{path} is missing, though dataset.json lists it with {file.rows} rows; copy the "
            "whole folder or prepare the data again"
        )
    size = path.stat().st_size
    if size != file.bytes:
        raise ChangedError(
            f"{path} has {size:,} bytes, dataset.json says {file.bytes:,}: it was changed or "
            "copied incompletely; copy it again or prepare the data again"
        )


def sha256_of(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
