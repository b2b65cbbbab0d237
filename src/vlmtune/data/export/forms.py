"""The forms: what each holds, as facts, and one function that writes a row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from vlmtune.data.boxes import to_grid
from vlmtune.data.conversation import Box, Conversation, Image, Message, Part, Role, Text
from vlmtune.data.formats.qwen_markup import GRID, render
from vlmtune.data.formats.turns import IMAGE_MARK
from vlmtune.data.media import Size
from vlmtune.errors import RowError

Fields: TypeAlias = dict[str, Any]
# A row cut to its form, the paths of its images and their upright sizes.
Write: TypeAlias = Callable[[Conversation, Sequence[str], Sequence[Size]], Fields]

EVERYBODY: tuple[Role, ...] = ("system", "user", "assistant")
ASKING: tuple[Role, ...] = ("system", "user")
NOTHING = re.compile(r"(?!)")
LISTS = (".json", ".jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a form can hold.

    Attributes:
        reader: The name in ``FORMATS`` that ``prepare`` reads it by.
        endings: Of its file; the first one unless the user's file has another.
        write: Writes a row that was cut to the form.
        single: Only one question and one answer.
        system: A system prompt.
        questions: A text of the user's beside the image.
        verbatim: Texts and images of a ``single`` row in any order.
        images: So many a row; None: any number.
        answers_show: Images in answers.
        boxes: Steps a side of the grid that boxes are on, ``pixels``, or None: no boxes.
        references: Several acceptable answers.
        marks: What cannot stand in a text, because it would be read as an image or a box.
        marked: Whose texts are read so.
    """

    reader: str
    endings: tuple[str, ...]
    write: Write
    single: bool = False
    system: bool = True
    questions: bool = True
    verbatim: bool = False
    images: int | None = None
    answers_show: bool = False
    boxes: int | Literal["pixels"] | None = None
    references: bool = False
    marks: re.Pattern[str] = NOTHING
    marked: tuple[Role, ...] = EVERYBODY

    def without_images(self) -> Form:
        """The same form of rows that have none."""
        return replace(self, images=0)


def _table(row: Conversation, paths: Sequence[str], _sizes: Sequence[Size]) -> Fields:
    """Cells; a table of rows without images has no column for them."""
    said = {message.role: message.text for message in row.messages}
    several = row.references != (said["assistant"],)
    return {
        "id": row.id,
        **({"image": paths[0]} if paths else {}),
        "question": said["user"],
        "text": said["assistant"],
        "answers": json.dumps(row.references, ensure_ascii=False) if several else "",
        "system": said.get("system", ""),
    }


def _tutorial_ocr(row: Conversation, paths: Sequence[str], _sizes: Sequence[Size]) -> Fields:
    turns = [{"role": "user", "value": paths[0]}, {"role": "assistant", "value": row.answer}]
    return {"id": row.id, "conversations": turns}


def _tutorial_caption(row: Conversation, paths: Sequence[str], _sizes: Sequence[Size]) -> Fields:
    def value(message: Message) -> str:
        return "".join(
            f"<|vision_start|>{paths[part.index]}<|vision_end|>"
            if isinstance(part, Image)
            else _text(part)
            for part in message.content
        )

    turns = [{"from": message.role, "value": value(message)} for message in row.messages]
    return {"id": row.id, "conversations": turns}


def _qwen(row: Conversation, paths: Sequence[str], sizes: Sequence[Size]) -> Fields:
    latest = -1
    for part in row.parts():
        if isinstance(part, Image):
            latest = part.index
        elif isinstance(part, Box) and part.image != latest:
            raise RowError(
                "box_image",
                f"a box lies on image {part.image + 1}, but image {latest + 1} is the latest "
                "before it; in this form a box always lies on the latest",
            )

    def on_grid(part: Part) -> Part:
        if not isinstance(part, Box):
            return part
        return replace(part, xyxy=to_grid(part.xyxy, sizes[part.image], GRID))

    turns = [
        {"from": message.role, "value": render([on_grid(part) for part in message.content], paths)}
        for message in row.messages
    ]
    return {"id": row.id, "conversations": turns}


def _llava(row: Conversation, paths: Sequence[str], _sizes: Sequence[Size]) -> Fields:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [
        {"from": names[message.role], "value": _with_breaks(message.content)}
        for message in row.messages
    ]
    image = {} if not paths else {"image": paths[0] if len(paths) == 1 else list(paths)}
    return {"id": row.id, **image, "conversations": turns}


def _with_breaks(parts: Sequence[Part]) -> str:
    """The text with placeholders, each on a line of its own; the reader takes the breaks off."""
    written = ""
    for number, part in enumerate(parts):
        if isinstance(part, Image):
            written += ("\n" if number else "") + IMAGE_MARK
        else:
            after_image = number > 0 and isinstance(parts[number - 1], Image)
            written += ("\n" if after_image else "") + _text(part)
    return written


def _sharegpt(row: Conversation, paths: Sequence[str], _sizes: Sequence[Size]) -> Fields:
    def content(message: Message) -> str:
        return "".join(
            IMAGE_MARK if isinstance(part, Image) else _text(part) for part in message.content
        )

    turns = [{"role": message.role, "content": content(message)} for message in row.messages]
    return {"id": row.id, "messages": turns, "images": list(paths)}


def _messages(row: Conversation, paths: Sequence[str], _sizes: Sequence[Size]) -> Fields:
    def part_of(part: Part) -> Fields:
        if isinstance(part, Image):
            return {"type": "image_url", "image_url": {"url": paths[part.index]}}
        return {"type": "text", "text": _text(part)}

    return {"id": row.id, "messages": _with_parts(row, part_of)}


def _trl(row: Conversation, paths: Sequence[str], _sizes: Sequence[Size]) -> Fields:
    def part_of(part: Part) -> Fields:
        return (
            {"type": "image"} if isinstance(part, Image) else {"type": "text", "text": _text(part)}
        )

    return {"id": row.id, "messages": _with_parts(row, part_of), "images": list(paths)}


def _with_parts(row: Conversation, part_of: Callable[[Part], Fields]) -> list[Fields]:
    """Messages with lists of parts, always: Arrow cannot hold a column of texts and lists."""
    return [
        {"role": message.role, "content": [part_of(part) for part in message.content]}
        for message in row.messages
    ]


def _swift(row: Conversation, paths: Sequence[str], _sizes: Sequence[Size]) -> Fields:
    boxes = [part for part in row.parts() if isinstance(part, Box)]

    def content(message: Message) -> str:
        for before, part in pairwise(message.content):
            if (
                isinstance(before, Box)
                and isinstance(part, Box)
                and before.label
                and not part.label
            ):
                raise RowError(
                    "box_label",
                    f"a box without a name follows one called {before.label!r}; in this form it "
                    "would be called so too",
                )
        return "".join(map(_swift_mark, message.content))

    turns = [{"role": message.role, "content": content(message)} for message in row.messages]
    fields: Fields = {"id": row.id, "messages": turns, "images": list(paths)}
    if boxes:
        fields["objects"] = {
            "ref": [box.label for box in boxes if box.label],
            "bbox": [list(box.xyxy) for box in boxes],
        }
        if len(paths) > 1:
            fields["objects"]["image_id"] = [box.image for box in boxes]
    return fields


def _swift_mark(part: Part) -> str:
    match part:
        case Image():
            return IMAGE_MARK
        case Box(_, label, _):
            return "<ref-object><bbox>" if label else "<bbox>"
        case Text(text):
            return text


def _text(part: Part) -> str:
    """A part's text, in forms that have no boxes."""
    return part.text if isinstance(part, Text) else ""


_VISION_MARKS = re.compile(r"<\|vision_(start|end)\|>")
_PLACEHOLDER = re.compile(re.escape(IMAGE_MARK))
_SWIFT_MARKS = re.compile(r"<image>|<ref-object>|<bbox>|<img>[^<>\n]+</img>")

FORMS: dict[str, Form] = {
    "csv": Form(
        reader="table", endings=(".csv",), write=_table, single=True, images=1, references=True
    ),
    "tutorial-ocr": Form(
        reader="tutorial-ocr",
        endings=(".json",),
        write=_tutorial_ocr,
        single=True,
        system=False,
        questions=False,
        images=1,
    ),
    "tutorial-caption": Form(
        reader="tutorial-caption",
        endings=(".json",),
        write=_tutorial_caption,
        single=True,
        system=False,
        verbatim=True,
        images=1,
        marks=_VISION_MARKS,
        marked=ASKING,
    ),
    "qwen": Form(reader="qwen-vl", endings=LISTS, write=_qwen, answers_show=True, boxes=GRID),
    "llava": Form(reader="llava", endings=LISTS, write=_llava, marks=_PLACEHOLDER, marked=ASKING),
    "sharegpt": Form(
        reader="sharegpt", endings=LISTS, write=_sharegpt, marks=_PLACEHOLDER, marked=ASKING
    ),
    "messages": Form(reader="openai", endings=LISTS[::-1], write=_messages, answers_show=True),
    "trl": Form(reader="trl", endings=LISTS[::-1], write=_trl, answers_show=True),
    "swift": Form(
        reader="ms-swift",
        endings=LISTS[::-1],
        write=_swift,
        answers_show=True,
        boxes="pixels",
        marks=_SWIFT_MARKS,
    ),
}
