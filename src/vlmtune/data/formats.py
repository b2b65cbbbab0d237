"""From raw rows to drafts of conversations: one function a format, and one line in ``FORMATS``.

A draft's images are still what the row says about them (a path, bytes); ``prepare`` reads them.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from vlmtune.data.conversation import Image, Message, Part, Text
from vlmtune.data.sources import FieldError
from vlmtune.errors import FormatError, UsageError

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Draft:
    """What a row says.

    Attributes:
        messages: The turns. Without an assistant turn at the end, one of ``references`` becomes it.
        images: A path, bytes, or a mapping with ``bytes`` or ``path``, in the order of the parts.
        references: Every acceptable answer; empty: the last turn's text.
        id: The row's own id, if it has one.
        field: Where the images stand in the row, for messages.
    """

    messages: tuple[Message, ...]
    images: tuple[Any, ...] = ()
    references: tuple[str, ...] = ()
    id: str | None = None
    field: str = "image"


Read: TypeAlias = Callable[[Row], Draft]


class Format(NamedTuple):
    """A format.

    Attributes:
        recognises: Whether sample rows are of this format.
        reader: Makes the function that reads a row, given sample rows and the user's ``--columns``.
    """

    recognises: Callable[[Sequence[Row]], bool]
    reader: Callable[[Sequence[Row], Mapping[str, str]], Read]


# ---------------------------------------------------------------------------------------- tables

# The columns of a table by what they are for, and the names they are found by.
COLUMNS: dict[str, tuple[str, ...]] = {
    "image": (
        "image",
        "images",
        "image_path",
        "img",
        "file_name",
        "filename",
        "path",
        "picture",
    ),
    "text": ("text", "caption", "latex", "formula", "answer", "label", "output", "target"),
    "answers": ("answers", "captions", "references"),
    "question": ("question", "query", "prompt", "instruction"),
    "id": ("id",),
}


def table(sample: Sequence[Row], columns: Mapping[str, str]) -> Read:
    """A table with a column of images and one of texts, and perhaps questions and ids.

    Raises:
        FormatError: A column that was asked for is not there, or it is not clear which one to take.
    """
    chosen = choose_columns(sample, columns)

    def read(row: Row) -> Draft:
        images: tuple[Any, ...] = ()
        if "image" in chosen:
            images = _cell_images(row, chosen["image"])
        question = _text(row.get(chosen["question"])) if "question" in chosen else ""
        parts: list[Part] = [Image(index) for index in range(len(images))]
        if question.strip():
            parts.append(Text(question))
        if not parts:
            raise FieldError(
                "empty_question",
                "the row has neither an image nor a question; expected at least one",
                field=chosen.get("question", ""),
            )
        messages = [Message("user", tuple(parts))]
        references = _answers(row.get(chosen["answers"])) if "answers" in chosen else ()
        text = _text(_required(row, chosen["text"])) if "text" in chosen else ""
        if text.strip():
            messages.append(Message("assistant", (Text(text),)))
        elif "text" in chosen or not references:
            raise FieldError(
                "empty_answer",
                "the answer is empty; nothing could be trained on it",
                field=chosen.get("text", chosen.get("answers", "")),
            )
        return Draft(
            tuple(messages),
            images,
            references,
            id=_text(row.get(chosen["id"])) if "id" in chosen else None,
            field=chosen.get("image", ""),
        )

    return read


def choose_columns(sample: Sequence[Row], asked: Mapping[str, str]) -> dict[str, str]:
    """Which column is for what: those asked for, the others by their names.

    Raises:
        FormatError: Naming the columns found, and the nearest name or all candidates.
    """
    found = list(dict.fromkeys(name for row in sample for name in row))
    for purpose, name in asked.items():
        if purpose not in COLUMNS:
            raise FormatError(
                f"--columns {purpose}={name}: unknown purpose {purpose!r}"
                f"{nearest(purpose, COLUMNS)}; expected one of {', '.join(COLUMNS)}"
            )
        if name not in found:
            raise FormatError(
                f"--columns {purpose}={name}: there is no column {name!r}{nearest(name, found)}; "
                f"found {', '.join(found)}"
            )
    chosen = dict(asked)
    taken = set(asked.values())
    for purpose, names in COLUMNS.items():
        if purpose in asked:
            continue
        candidates = [
            name
            for name in found
            if name.lower() in names and name not in taken and _suits(purpose, sample, name)
        ]
        if purpose == "text" and "answers" in asked:
            continue
        if len(candidates) > 1:
            raise FormatError(
                f"it is not clear which column holds the {purpose}: {', '.join(candidates)}. "
                f"Say so with --columns {purpose}={candidates[0]}"
            )
        if candidates:
            chosen[purpose] = candidates[0]
    _check_enough(chosen, found)
    return chosen


def _check_enough(chosen: Mapping[str, str], found: Sequence[str]) -> None:
    listed = ", ".join(found) or "none"
    if "text" not in chosen and "answers" not in chosen:
        raise FormatError(
            f"no column of answers found among the columns {listed}; expected one called "
            f"{', '.join(COLUMNS['text'])}, or --columns text=NAME"
        )
    if "image" not in chosen and "question" not in chosen:
        raise FormatError(
            f"no column of images found among the columns {listed}; expected one called "
            f"{', '.join(COLUMNS['image'])}, or --columns image=NAME"
        )


def _suits(purpose: str, sample: Sequence[Row], name: str) -> bool:
    """Whether what stands in a column can be for ``purpose``: a struct, say, is no text."""
    if purpose != "text":
        return True
    values = [row[name] for row in sample if row.get(name) is not None]
    return not any(isinstance(value, dict | list) for value in values)


def nearest(name: str, names: Iterable[str]) -> str:
    """`` (did you mean 'text'?)``, or nothing if no name is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _required(row: Row, name: str) -> Any:
    if name not in row:
        raise FieldError(
            "missing_field",
            f"the row has no {name!r}; found {', '.join(row) or 'none'}",
            field=name,
        )
    return row[name]


def _cell_images(row: Row, name: str) -> tuple[Any, ...]:
    value = _required(row, name)
    if value is None or value in ("", b"", []):
        raise FieldError("missing_field", f"{name!r} is empty; expected an image", field=name)
    return tuple(value) if isinstance(value, list) else (value,)


def _text(value: Any) -> str:
    """A cell as text; of a text by language the English one, or else the first."""
    if isinstance(value, Mapping):
        texts = {key: text for key, text in value.items() if text is not None}
        value = texts.get("en", next(iter(texts.values()), None))
    # Of floats NaN alone differs from itself: pandas' mark of an empty cell.
    return "" if value is None or value != value else str(value)


def _answers(value: Any) -> tuple[str, ...]:
    """Acceptable answers of a cell: a list, a list written as JSON, or a single text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return (str(value),)
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in map(_text, values) if text.strip())


# ------------------------------------------------------------------------- lists of conversations

_IMAGE_MARK = re.compile(r"<\|vision_start\|>(.*?)<\|vision_end\|>", re.DOTALL)
_IMAGE_FILE = re.compile(r"[^\n]+\.(png|jpe?g|gif|webp|bmp|tiff?|ppm|pgm|jp2|avif)", re.IGNORECASE)


def tutorial_ocr(_sample: Sequence[Row], _columns: Mapping[str, str]) -> Read:
    """``{"conversations": [{"role": "user", "value": PATH}, …]}``: the user shows an image."""

    def parts(role: str, value: str, images: list[Any]) -> tuple[Part, ...]:
        if role != "user":
            return (Text(value),)
        images.append(value)
        return (Image(len(images) - 1),)

    return lambda row: _conversation(row, "role", parts)


def tutorial_caption(_sample: Sequence[Row], _columns: Mapping[str, str]) -> Read:
    """``{"conversations": [{"from": "user", "value": TEXT WITH IMAGES IN VISION MARKS}, …]}``."""

    def parts(role: str, value: str, images: list[Any]) -> tuple[Part, ...]:
        if role != "user":
            return (Text(value),)
        # re.split with one group: text, path, text, path, …, text
        pieces: list[Part] = []
        for number, piece in enumerate(_IMAGE_MARK.split(value)):
            if number % 2:
                images.append(piece.strip())
                pieces.append(Image(len(images) - 1))
            elif piece:
                pieces.append(Text(piece))
        return tuple(pieces)

    return lambda row: _conversation(row, "from", parts)


_ROLES: dict[str, Any] = {"system": "system", "user": "user", "assistant": "assistant"}


def _conversation(
    row: Row, role_key: str, parts: Callable[[str, str, list[Any]], tuple[Part, ...]]
) -> Draft:
    turns = _required(row, "conversations")
    if not isinstance(turns, list):
        raise FieldError("bad_row", "'conversations' is no list of turns", field="conversations")
    messages: list[Message] = []
    images: list[Any] = []
    for number, turn in enumerate(turns, start=1):
        field = f"conversations[{number - 1}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise FieldError("missing_field", f"turn {number} has no text in 'value'", field=field)
        role = turn.get(role_key)
        if role not in _ROLES:
            raise FieldError(
                "bad_role",
                f"turn {number} has {role_key!r} = {role!r}; expected {', '.join(_ROLES)}",
                field=field,
            )
        if role == "user" and not turn["value"].strip():
            raise FieldError("empty_question", f"the user's turn {number} is empty", field=field)
        messages.append(Message(_ROLES[role], parts(role, turn["value"], images)))
    identity = row.get("id")
    return Draft(
        tuple(messages),
        tuple(images),
        id=None if identity is None else str(identity),
        field="conversations",
    )


def _first_user_turns(sample: Sequence[Row], role_key: str) -> list[str]:
    """What the user says first in each sample row; empty unless all are conversations."""
    values = []
    for row in sample:
        turns = row.get("conversations")
        if not isinstance(turns, list):
            return []
        for turn in turns:
            if isinstance(turn, dict) and turn.get(role_key) == "user":
                values.append(str(turn.get("value")))
                break
    return values


def _is_table(sample: Sequence[Row]) -> bool:
    return not any({"conversations", "messages"} & row.keys() for row in sample)


def _is_tutorial_ocr(sample: Sequence[Row]) -> bool:
    values = _first_user_turns(sample, "role")
    return bool(values) and any(_IMAGE_FILE.fullmatch(value.strip()) for value in values)


def _is_tutorial_caption(sample: Sequence[Row]) -> bool:
    return any(_IMAGE_MARK.search(value) for value in _first_user_turns(sample, "from"))


FORMATS: dict[str, Format] = {
    "table": Format(_is_table, table),
    "tutorial-ocr": Format(_is_tutorial_ocr, tutorial_ocr),
    "tutorial-caption": Format(_is_tutorial_caption, tutorial_caption),
}


def detect(sample: Sequence[Row], asked: str) -> str:
    """The name of the format that ``sample`` is in, or the one asked for.

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
        return asked
    names = [name for name, format_ in FORMATS.items() if format_.recognises(sample)]
    if len(names) == 1:
        return names[0]
    keys = ", ".join(dict.fromkeys(key for row in sample for key in row))
    if names:
        raise FormatError(
            f"the rows (with {keys}) could be {' or '.join(names)}; say which with --format"
        )
    raise FormatError(
        f"the rows (with {keys}) are in no form that is known: {', '.join(FORMATS)}; if one of "
        "them is meant, name it with --format to see what does not fit"
    )
