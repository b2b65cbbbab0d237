"""Rows into the dataset or the quarantine, where that depends on the rows before them."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from vlmtune.data.columns import array_of
from vlmtune.data.quarantine import Quarantine, entry_line
from vlmtune.data.records import FieldError, Record
from vlmtune.data.rows import SCHEMA, conversation_to_row, row_digest, row_to_conversation
from vlmtune.data.splits import ImageGroups
from vlmtune.data.work import Kept, Refused, Result
from vlmtune.data.writer import DatasetWriter

# Formats whose ids name a picture, not a row: several rows of LLaVA's sets ask about the same one.
REPEATS_IDS = frozenset({"llava"})


class Sorter:
    """Sorts rows in their order. Keeps about 300 bytes a row: its id and its images' hashes.

    Attributes:
        ids: Of the kept rows.
        splits: Of the kept rows.
        groups: Which of the kept rows share images.
        renamed: Rows that got an id of their own.
    """

    def __init__(self, writer: DatasetWriter, quarantine: Quarantine, format: str) -> None:
        self._writer, self._quarantine = writer, quarantine
        self._repeats = format in REPEATS_IDS
        self._rows_with: dict[str, int] = {}  # rows by id
        self._digests: set[bytes] = set()  # of all rows, where ids repeat
        self.ids: list[str] = []
        self.splits: list[str] = []
        self.groups = ImageGroups()
        self.renamed = 0

    def take(self, records: Sequence[Record], result: Result) -> None:
        """Take the next rows, and what their worker made of them."""
        kept: list[Kept] = []
        names: list[str | None] = []  # None: the row is left out
        for record, outcome in zip(records, result.outcomes, strict=True):
            if isinstance(outcome, Refused):
                self._quarantine.add(outcome.code, outcome.line)
                continue
            kept.append(outcome)
            names.append(self._name(outcome))
            if names[-1] is None:
                fault = FieldError(
                    "duplicate_id",
                    f"an earlier row has the id {outcome.id!r} too; ids must be unique",
                    field="id",
                    value=outcome.id,
                )
                self._quarantine.add(fault.code, entry_line(record, outcome.id, fault))
        self._write(result.batch, kept, names)

    def _name(self, row: Kept) -> str | None:
        """An id that no earlier row has: the row's own, ``id#2`` where ids repeat, or none."""
        rows = self._rows_with.get(row.id, 0)
        if rows and (not self._repeats or row.digest in self._digests):
            return None
        if self._repeats:
            self._digests.add(row.digest)
        self._rows_with[row.id] = rows + 1
        if not rows:
            return row.id
        number = rows + 1
        while (name := f"{row.id}#{number}") in self._rows_with:
            number += 1
        self._rows_with[name] = 1
        self.renamed += 1
        return name

    def _write(
        self, batch: pa.RecordBatch, kept: Sequence[Kept], names: Sequence[str | None]
    ) -> None:
        digests = []
        for position, (row, name) in enumerate(zip(kept, names, strict=True)):
            if name is None:
                continue
            digests.append(row.digest if name == row.id else _renamed(batch, position, name, row))
            self.ids.append(name)
            self.splits.append(row.split)
            self.groups.add(row.images)
        if any(name != row.id for row, name in zip(kept, names, strict=True)):
            batch = batch.set_column(0, SCHEMA.field("id"), array_of(names, pa.string()))
            batch = batch.filter(array_of([name is not None for name in names], pa.bool_()))
        self._writer.add_batch(batch, digests)


def _renamed(batch: pa.RecordBatch, position: int, name: str, row: Kept) -> bytes:
    """The digest of a row with another id."""
    (stored,) = batch.slice(position, 1).to_pylist()
    written = conversation_to_row(row_to_conversation(stored))
    return row_digest({**written, "id": name}, row.images)
