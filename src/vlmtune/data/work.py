"""The work on one row that depends on no other: read, build, decode, hash; rows go in portions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from vlmtune.data.build import Builder
from vlmtune.data.columns import batch_of
from vlmtune.data.formats import FORMATS
from vlmtune.data.options import PrepareOptions
from vlmtune.data.quarantine import entry_line
from vlmtune.data.records import Record, size_of
from vlmtune.data.rows import SCHEMA, conversation_to_row, image_digests, row_digest
from vlmtune.data.splits import split_of
from vlmtune.errors import DataError, FetchError, RowError
from vlmtune.fetch import fetch_image_bytes

# A portion that is read ends at one of these, what was built of it is handed on at the last: a
# process holds little, whatever the rows are.
ROWS_PER_PORTION = 32
BYTES_PER_PORTION = 8 * 2**20
BYTES_PER_RESULT = 16 * 2**20

FETCH_RETRIES = 2


class Portion(NamedTuple):
    """Raw rows that follow each other; ``first`` is the number of the first, counted from 1."""

    first: int
    records: list[Record]


@dataclass(frozen=True, slots=True)
class Kept:
    """A row that is good by itself.

    Attributes:
        id: Its id, which another row may have too.
        split: The split that its column names; ``train`` without one.
        digest: Its ``row_digest``.
        images: SHA-256 of its images.
    """

    id: str
    split: str
    digest: bytes
    images: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that is not: the code and the ledger's line."""

    code: str
    line: str


@dataclass(frozen=True, slots=True)
class Result:
    """What became of the next rows of a portion.

    Attributes:
        outcomes: One a row.
        batch: The kept ones, in ``SCHEMA``.
        last: Whether the portion ends with them.
    """

    outcomes: list[Kept | Refused]
    batch: pa.RecordBatch
    last: bool


@dataclass(frozen=True)
class Task:
    """All that a process needs to know to work on rows.

    Attributes:
        format: A name in ``FORMATS``.
        sample: The first rows, that columns are chosen by.
        options: The user's.
    """

    format: str
    sample: list[Mapping[str, Any]]
    options: PrepareOptions


def portions(records: Iterable[Record]) -> Iterator[Portion]:
    """Rows in portions, which are the same whoever works on them."""
    first, waiting, size = 1, list[Record](), 0
    for record in records:
        waiting.append(record)
        size += size_of(record.fields)
        if len(waiting) == ROWS_PER_PORTION or size >= BYTES_PER_PORTION:
            yield Portion(first, waiting)
            first, waiting, size = first + len(waiting), [], 0
    if waiting:
        yield Portion(first, waiting)


@dataclass(slots=True)
class _Building:
    """Rows on their way into a ``Result``."""

    outcomes: list[Kept | Refused] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    bytes: int = 0

    def result(self, *, last: bool) -> Result:
        return Result(self.outcomes, batch_of(self.rows, SCHEMA), last)


class RowWork:
    """Works on portions; equal ones give equal results, in whatever process and order."""

    def __init__(self, task: Task) -> None:
        options = task.options
        self._read = FORMATS[task.format].reader(task.sample, options.columns)
        self._column = options.split_column
        self._builder = Builder(
            options.images_root,
            options.prompt,
            options.answer_separator,
            options.seed,
            fetched if options.allow_urls else None,
        )

    def results(self, portion: Portion) -> Iterator[Result]:
        """Each row kept or refused, in order."""
        building = _Building()
        for number, record in enumerate(portion.records, start=portion.first):
            self._take(number, record, building)
            if building.bytes >= BYTES_PER_RESULT:
                yield building.result(last=False)
                building = _Building()
        yield building.result(last=True)

    def _take(self, number: int, record: Record, building: _Building) -> None:
        identity = str(record.fields.get("id") or f"row-{number:06d}")
        try:
            if record.fault is not None:
                raise RowError(*record.fault)
            draft = self._read(record.fields)
            identity = draft.id or f"row-{number:06d}"
            split = "train" if self._column is None else split_of(record, self._column)
            conversation = self._builder.build(draft, identity, record.base, record.where)
        except DataError as fault:
            building.outcomes.append(Refused(fault.code, entry_line(record, identity, fault)))
            return
        row = conversation_to_row(conversation)
        images = image_digests(row)
        building.outcomes.append(Kept(identity, split, row_digest(row, images), images))
        building.rows.append(row)
        building.bytes += size_of(row)


def fetched(url: str) -> bytes:
    """The bytes behind a URL; one that answers too late is asked again.

    Raises:
        FetchError: It gave none.
    """
    for attempt in range(FETCH_RETRIES + 1):
        try:
            return fetch_image_bytes(url)
        except FetchError as fault:
            if fault.code != "url_timeout" or attempt == FETCH_RETRIES:
                raise
    raise AssertionError("the last attempt returns or raises")
