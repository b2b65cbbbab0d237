"""From raw rows to drafts of conversations: one function a format, and one line in ``FORMATS``.

A draft's images are still what the row says about them (a path, bytes); ``data.build`` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmtune.data.formats import chat, coco, qwen, swift, table
from vlmtune.data.formats.draft import Draft, Read, Row, keys_of, nearest
from vlmtune.data.formats.shape import Shape, shape_of
from vlmtune.data.formats.table import COLUMNS, choose_columns
from vlmtune.errors import FormatError, UsageError

__all__ = [
    "COLUMNS",
    "FORMATS",
    "Detection",
    "Draft",
    "Format",
    "Read",
    "Row",
    "choose_columns",
    "detect",
    "nearest",
]


class Format(NamedTuple):
    """A format.

    Attributes:
        recognises: Says why rows of a shape are of this format; empty where they are not.
        reader: Makes the function that reads a row, given sample rows and the user's ``--columns``.
    """

    recognises: Callable[[Shape], str]
    reader: Callable[[Sequence[Row], Mapping[str, str]], Read]


FORMATS: dict[str, Format] = {
    "table": Format(table.is_table, table.table),
    "imagefolder": Format(table.is_imagefolder, table.table),
    "tutorial-ocr": Format(qwen.is_tutorial_ocr, qwen.tutorial_ocr),
    "tutorial-caption": Format(qwen.is_tutorial_caption, qwen.tutorial_caption),
    "qwen-vl": Format(qwen.is_qwen_vl, qwen.qwen_vl),
    "llava": Format(chat.is_llava, chat.llava),
    "sharegpt": Format(chat.is_sharegpt, chat.sharegpt),
    "openai": Format(chat.is_openai, chat.openai),
    "trl": Format(chat.is_trl, chat.trl),
    "ms-swift": Format(swift.is_ms_swift, swift.ms_swift),
    "coco": Format(coco.is_coco, coco.coco),
}
TABLES = ("table", "imagefolder")
# What joins several answers in a cell of ModelScope's caption sets.
JOINT = "&&"


@dataclass(frozen=True, slots=True)
class Detection:
    """What a source was taken for.

    Attributes:
        name: A name in ``FORMATS``.
        reason: Why, in a few words.
        notes: What looks as if an option were missing.
    """

    name: str
    reason: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it is printed and recorded."""
        return {"name": self.name, "reason": self.reason, "notes": list(self.notes)}

    def __str__(self) -> str:
        return f"taken for {self.name}: {self.reason}"


def detect(sample: Sequence[Row], asked: str = "auto", columns: Collection[str] = ()) -> Detection:
    """The format that ``sample`` is in, or the one asked for.

    Args:
        sample: The first rows.
        asked: ``--format``.
        columns: Purposes named in ``--columns``; only tables have any.

    Raises:
        UsageError: There is no format of that name.
        FormatError: None, or several, recognise the rows.
    """
    if asked != "auto":
        if asked not in FORMATS:
            raise UsageError(
                f"--format {asked}: no such format{nearest(asked, FORMATS)}; "
                f"expected auto, {', '.join(FORMATS)}"
            )
        return _detection(asked, f"--format {asked}", sample)
    shape = shape_of(sample)
    reasons = {name: format_.recognises(shape) for name, format_ in FORMATS.items()}
    found = {name: reason for name, reason in reasons.items() if reason}
    if columns and not any(name in TABLES for name in found):
        return _detection("table", "--columns names its columns", sample)
    if len(found) == 1:
        ((name, reason),) = found.items()
        return _detection(name, reason, sample)
    keys = ", ".join(keys_of(sample))
    if found:
        listed = " or ".join(f"{name} ({reason})" for name, reason in found.items())
        raise FormatError(f"the rows (with {keys}) could be {listed}; say which with --format")
    raise FormatError(
        f"the rows (with {keys}) are in no form that is known: {', '.join(FORMATS)}; if one of "
        "them is meant, name it with --format to see what does not fit"
    )


def _detection(name: str, reason: str, sample: Sequence[Row]) -> Detection:
    return Detection(name, reason, tuple(_joint_answers(sample)) if name in TABLES else ())


def _joint_answers(sample: Sequence[Row]) -> list[str]:
    notes = []
    for column in keys_of(sample):
        texts = [row[column] for row in sample if isinstance(row.get(column), str)]
        joint = sum(JOINT in text for text in texts)
        if texts and joint > len(texts) / 2:
            notes.append(
                f"{joint} of {len(texts)} texts in {column!r} hold {JOINT!r}; if it stands between "
                f"several answers, say so with --answer-separator '{JOINT}'"
            )
    return notes
