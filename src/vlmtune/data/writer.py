"""Writes a prepared dataset, so that it is there whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune.data.columns import array_of, batch_of
from vlmtune.data.conversation import Conversation
from vlmtune.data.dataset import FORMAT_VERSION, DataFile, DatasetInfo, sha256_of
from vlmtune.data.rows import SCHEMA, conversation_to_row, image_digests, row_digest
from vlmtune.errors import RefusedError
from vlmtune.files import claim, holds, sync

# A random row costs its whole row group: 0.4 ms with 32 rows, 140 ms with pyarrow's default.
ROWS_PER_GROUP = 32
BYTES_PER_SHARD = 512 * 2**20
SPLITS = ("train", "validation")


class DatasetWriter:
    """Writes a whole dataset beside its place and moves it there at the end.

    ::

        with DatasetWriter(out) as writer:
            writer.add(conversation)
            writer.finish(validation={3}, source="table.csv", options={})
            writer.publish()

    A process killed at any point leaves at most the hidden folder ``.NAME.partial``, which the next
    writer of the same dataset clears away. Equal rows give equal bytes.

    Attributes:
        out: Where the dataset will be.
        folder: Where it is until it is published.

    Raises:
        RefusedError: Another process is writing the same dataset.
    """

    def __init__(self, out: str | Path) -> None:
        # Not resolve(): a symbolic link as ``out`` is not to be followed by the final rename.
        self.out = Path(out).absolute()
        self.folder = self.out.parent / f".{self.out.name}.partial"
        self._digests: list[bytes] = []
        self._pending: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        lock = claim(self.folder)
        if lock is None:
            raise RefusedError(
                f"another process is preparing {self.out} now; wait for it or choose another --out"
            )
        self._lock = lock
        for left in self.folder.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
        # Which split a row is in is known only after the last one; until then all wait here.
        self._waiting = self.folder / "rows.arrow"
        self._stream = pa.ipc.new_stream(str(self._waiting), SCHEMA)
        return self

    def __len__(self) -> int:
        """Rows added so far."""
        return len(self._digests)

    def add(self, conversation: Conversation) -> None:
        """Append a row."""
        row = conversation_to_row(conversation)
        self._digests.append(row_digest(row, image_digests(row)))
        self._pending.append(row)
        if len(self._pending) == ROWS_PER_GROUP:
            self._flush()

    def add_batch(self, batch: pa.RecordBatch, digests: Sequence[bytes]) -> None:
        """Append rows that are in ``SCHEMA`` already, with the ``row_digest`` of each."""
        self._flush()
        self._digests.extend(digests)
        if len(batch):
            self._stream.write_batch(batch)

    def _flush(self) -> None:
        if self._pending:
            self._stream.write_batch(batch_of(self._pending, SCHEMA))
        self._pending = []

    def finish(
        self, validation: Collection[int], source: str, options: dict[str, Any]
    ) -> DatasetInfo:
        """Write the splits and ``dataset.json``; all that is left to do is ``publish``.

        Args:
            validation: Positions of the rows, in the order added, that are the validation split.
            source: Where the rows came from, for the record.
            options: What they were prepared with, for the record.
        """
        self._flush()
        self._stream.close()
        (self.folder / "data").mkdir()
        writers = {name: _SplitWriter(self.folder / "data", name) for name in SPLITS}
        position = 0
        # Read, not mapped: the pages of a mapped file would count as memory of this process.
        with pa.OSFile(str(self._waiting)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                positions = range(position, position + len(batch))
                position += len(batch)
                for name, writer in writers.items():
                    mask = [(row in validation) == (name == "validation") for row in positions]
                    chosen = (
                        self._digests[row] for row, ok in zip(positions, mask, strict=True) if ok
                    )
                    writer.add(
                        pa.Table.from_batches([batch.filter(array_of(mask, pa.bool_()))]), chosen
                    )
        self._waiting.unlink()
        files = [file for writer in writers.values() for file in writer.close()]
        fingerprints = {name: writer.digest.hexdigest() for name, writer in writers.items()}
        total = json.dumps(fingerprints, sort_keys=True)
        info = DatasetInfo(
            format_version=FORMAT_VERSION,
            tool_version=importlib.metadata.version("vlmtune"),
            source=source,
            options=options,
            splits={name: writer.rows for name, writer in writers.items()},
            fingerprints=fingerprints,
            fingerprint=hashlib.sha256(total.encode()).hexdigest(),
            files=tuple(files),
        )
        write_json(self.folder / "dataset.json", info.model_dump())
        return info

    def publish(self, replacing: Iterable[str] = ()) -> None:
        """Move the folder to ``out``, which may hold no files but those named in ``replacing``."""
        if self.out.is_dir():
            for name in replacing:
                (self.out / name).unlink(missing_ok=True)
        sync(self.folder)
        self.folder.rename(self.out)
        sync(self.out.parent)

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        if holds(self._lock, self.folder):
            shutil.rmtree(self.folder)
        os.close(self._lock)


class _SplitWriter:
    """Writes one split's shards; they get their names at the end, when their number is known."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._shards: list[Path] = []
        self._rows_of: list[int] = []
        self._writer: pq.ParquetWriter | None = None
        self._bytes = 0  # of images and texts in the open shard
        self._pending: list[pa.Table] = []
        self.rows = 0
        self.digest = hashlib.sha256()

    def add(self, table: pa.Table, digests: Iterable[bytes]) -> None:
        for digest in digests:
            self.digest.update(digest)
        self.rows += len(table)
        self._pending.append(table)
        while sum(map(len, self._pending)) >= ROWS_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        waiting = pa.concat_tables(self._pending)
        group, rest = waiting.slice(0, ROWS_PER_GROUP), waiting.slice(ROWS_PER_GROUP)
        self._pending = [rest] if len(rest) else []
        # One chunk, so that neither its bytes nor its size tell in which portions the rows came.
        group = group.combine_chunks()
        if self._writer is not None and self._bytes + group.nbytes > BYTES_PER_SHARD:
            self._close_shard()
        if self._writer is None:
            self._shards.append(self._folder / f"{self._split}-{len(self._shards):05d}.partial")
            self._rows_of.append(0)
            self._writer = pq.ParquetWriter(
                self._shards[-1],
                SCHEMA,
                compression="none",
                use_dictionary=False,
                write_statistics=False,
            )
        self._writer.write_table(group, row_group_size=ROWS_PER_GROUP)
        self._bytes += group.nbytes
        self._rows_of[-1] += len(group)

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._bytes = None, 0

    def close(self) -> Iterator[DataFile]:
        if sum(map(len, self._pending)):
            self._write_group()
        self._close_shard()
        for number, (partial, rows) in enumerate(zip(self._shards, self._rows_of, strict=True)):
            name = f"{self._split}-{number:05d}-of-{len(self._shards):05d}.parquet"
            path = partial.rename(self._folder / name)
            sync(path)
            yield DataFile(
                path=f"data/{name}",
                split=self._split,
                rows=rows,
                bytes=path.stat().st_size,
                sha256=sha256_of(path),
            )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON, on the disk when this returns."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(path)
