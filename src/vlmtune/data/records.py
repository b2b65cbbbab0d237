"""A raw row, and what can be wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlmtune.errors import RowError


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


class Fault(NamedTuple):
    """A ``RowError`` that can be sent to another process."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Record:
    """A raw row.

    Attributes:
        where: Its place, e.g. ``table.csv:17`` (line) or ``list.json[16]``.
        fields: Its cells by column.
        base: The folder that relative paths in it start from; None for rows of a hub or an archive.
        fault: Why it could not even be read; ``fields`` then hold what there was.
    """

    where: str
    fields: Mapping[str, Any]
    base: Path | None
    fault: Fault | None = None


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


def size_of(value: Any) -> int:
    """About how many bytes a cell holds: texts and bytes count, the rest is small."""
    total, waiting = 0, [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, str | bytes | bytearray):
            total += len(found)
        elif isinstance(found, Mapping):
            waiting.extend(found.values())
        elif isinstance(found, list | tuple):
            waiting.extend(found)
        else:
            total += 8
    return total
