"""What a format makes of a row, and the small tools that all formats read cells with."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from vlmtune.data.conversation import Message, Part, Text
from vlmtune.data.media import Size
from vlmtune.data.sources import FieldError
from vlmtune.errors import FormatError

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Draft:
    """What a row says; its images are not read yet, so that boxes may not be in pixels yet.

    Attributes:
        messages: The turns. Without an assistant turn at the end, one of ``references`` becomes it.
        images: A path, bytes, a URL, or a mapping with ``bytes`` or ``path``, in the order of the
            parts.
        references: Every acceptable answer; empty: the last turn's text.
        id: The row's own id, if it has one.
        field: Where the images stand in the row, for messages.
        box_scale: What width and height of an image count in the boxes of ``messages``: 1000 for a
            grid of 1000 steps, 1 for fractions; None: the boxes are in pixels already.
        size: The size that the row says its image has; boxes in pixels of another would be wrong.
        notes: What was left out or read in a way that the user may want to know.
    """

    messages: tuple[Message, ...]
    images: tuple[Any, ...] = ()
    references: tuple[str, ...] = ()
    id: str | None = None
    field: str = "image"
    box_scale: float | None = None
    size: Size | None = None
    notes: tuple[str, ...] = ()


Read: TypeAlias = Callable[[Row], Draft]


def cell(row: Row, name: str) -> Any:
    """A row's cell; ``query.en`` is ``en`` in the column ``query``, unless it is a column itself.

    Raises:
        FieldError: ``missing_field``.
    """
    value: Any = row
    for key in (name,) if name in row else name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise FieldError(
                "missing_field",
                f"the row has no {name!r}; found {', '.join(row) or 'none'}",
                field=name,
            )
        value = value[key]
    return value


def as_text(value: Any) -> str:
    """A cell as text; of a text by language the English one, or else the first."""
    if isinstance(value, Mapping):
        texts = {key: text for key, text in value.items() if text is not None}
        value = texts.get("en", next(iter(texts.values()), None))
    # Of floats NaN alone differs from itself: pandas' mark of an empty cell.
    return "" if value is None or value != value else str(value)


def as_list(value: Any) -> tuple[Any, ...]:
    """A cell that holds one thing, several in a list, or none."""
    if value is None or value in ("", b""):
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def identity(row: Row) -> str | None:
    """The row's ``id``, if it has one."""
    value = row.get("id")
    return None if value is None else str(value)


def tidy(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The parts without empty texts, texts that follow each other as one."""
    kept: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and kept and isinstance(kept[-1], Text):
            kept[-1] = Text(kept[-1].text + part.text)
        elif not isinstance(part, Text) or part.text:
            kept.append(part)
    return tuple(kept)


def refuse_columns(columns: Mapping[str, str], name: str) -> None:
    """Refuse ``--columns`` for a format that has no columns to choose.

    Raises:
        FormatError: There are some.
    """
    if columns:
        raise FormatError(
            f"--columns names columns of a table, but the rows are taken for {name}, whose fields "
            "have fixed names; leave --columns away, or say --format table"
        )


def nearest(name: str, names: Iterable[str]) -> str:
    """`` (did you mean 'text'?)``, or nothing if no name is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def keys_of(sample: Sequence[Row]) -> list[str]:
    """The columns of all rows, in the order they first appear in."""
    return list(dict.fromkeys(name for row in sample for name in row))
