"""What sample rows look like: the facts that formats are recognised by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.data.formats.draft import Row

TURN_LISTS = ("messages", "conversations")
# Where a user's words may stand outside turns.
QUESTIONS = ("query", "prompt")


@dataclass(slots=True)
class Shape:
    """Facts of a sample.

    Attributes:
        columns: All columns.
        keys: Columns that hold something in at least one row.
        lists: Those of ``TURN_LISTS`` that hold turns.
        turn_keys: Names that turns use for role and content.
        roles: Roles as written, in lower case.
        user_texts: What users say.
        texts: What anybody says.
        parts: Types of contents that are lists of parts.
    """

    columns: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    lists: set[str] = field(default_factory=set)
    turn_keys: set[str] = field(default_factory=set)
    roles: set[str] = field(default_factory=set)
    user_texts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    parts: set[str] = field(default_factory=set)

    def says(self, *marks: str) -> str:
        """The first of ``marks`` that stands in a text, or nothing."""
        return next((mark for mark in marks if any(mark in text for text in self.texts)), "")

    def has(self, *keys: str) -> bool:
        """Whether the rows have all of ``keys``."""
        return self.keys.issuperset(keys)

    @property
    def image_key(self) -> str:
        """``images`` or ``image``, whichever the rows have, or nothing."""
        return next((key for key in ("images", "image") if key in self.keys), "")


def shape_of(sample: Sequence[Row]) -> Shape:
    """The facts of sample rows."""
    shape = Shape()
    for row in sample:
        shape.columns.update(row)
        shape.keys.update(key for key, value in row.items() if not _is_empty(value))
        for key in QUESTIONS:
            if isinstance(row.get(key), str):
                shape.user_texts.append(row[key])
        for name in TURN_LISTS:
            for turn in _turns(row.get(name)):
                shape.lists.add(name)
                _note_turn(shape, turn)
    shape.texts.extend(shape.user_texts)
    return shape


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | list | dict) and not value)


def _turns(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, list):
        yield from (turn for turn in value if isinstance(turn, Mapping))


def _note_turn(shape: Shape, turn: Mapping[str, Any]) -> None:
    shape.turn_keys.update(key for key, value in turn.items() if value is not None)
    role = str(turn.get("from") or turn.get("role")).lower()
    shape.roles.add(role)
    texts = shape.user_texts if role in ("user", "human") else shape.texts
    for key in ("value", "content"):
        content = turn.get(key)
        if isinstance(content, str):
            texts.append(content)
        for part in _turns(content):
            shape.parts.add(str(part.get("type")))
            if isinstance(part.get("text"), str):
                texts.append(part["text"])
