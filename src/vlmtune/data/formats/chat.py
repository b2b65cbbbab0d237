"""Lists of turns with the images beside them: LLaVA, ShareGPT, OpenAI, TRL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlmtune.data.conversation import Image, Part, Text
from vlmtune.data.formats.draft import Draft, Read, Row, cell, refuse_columns
from vlmtune.data.formats.shape import Shape
from vlmtune.data.formats.turns import (
    IMAGE_MARK,
    Shelf,
    Turn,
    draft_of,
    placeholders,
    turns_of,
    without_leading_answer,
)
from vlmtune.data.sources import FieldError

# What stands in a text only where ms-swift's tools read it.
SWIFT_MARKS = ("<bbox>", "<ref-object>", "<img>")


def is_llava(shape: Shape) -> str:
    """Why rows are LLaVA's, or nothing."""
    if "conversations" not in shape.lists or not shape.roles.intersection(("human", "gpt")):
        return ""
    if "from" not in shape.turn_keys or "image" not in shape.keys:
        return ""
    return "'image' beside 'conversations' from human and gpt"


def llava(_sample: Sequence[Row], columns: Mapping[str, str]) -> Read:
    r"""``{"image": PATH, "conversations": [{"from": "human", "value": "<image>\n…"}, …]}``.

    The line break between a placeholder and a text is the format's, not the user's. As in LLaVA's
    own training, an answer before the first question is left out.
    """
    refuse_columns(columns, "llava")

    def read(row: Row) -> Draft:
        turns, notes = without_leading_answer(turns_of(row, "conversations"))
        shelf = Shelf(row, "image", "images")

        def parts(turn: Turn) -> Sequence[Part]:
            return _without_breaks(placeholders(turn, shelf))

        return draft_of(row, turns, shelf, parts, notes)

    return read


def _without_breaks(parts: Sequence[Part]) -> list[Part]:
    """The parts without one line break on either side of each image."""
    kept: list[Part] = []
    for number, part in enumerate(parts):
        if isinstance(part, Text):
            text = part.text
            if number > 0:
                text = text.removeprefix("\n")
            if number < len(parts) - 1:
                text = text.removesuffix("\n")
            kept.append(Text(text))
        else:
            kept.append(part)
    return kept


def is_sharegpt(shape: Shape) -> str:
    """Why rows are ShareGPT's as LLaMA-Factory reads them, or nothing."""
    if shape.parts or shape.says("<|vision_start|>"):
        return ""
    if "messages" in shape.lists and not is_swift_messages(shape):
        if shape.says(IMAGE_MARK):
            return f"'messages' with {IMAGE_MARK} placeholders (ms-swift's are read alike)"
        return "'messages' with 'from' and 'value'" if "from" in shape.turn_keys else ""
    if "conversations" not in shape.lists:
        return ""
    if shape.turn_keys.issuperset(("role", "content")):
        return "'conversations' with 'role' and 'content'"
    if "from" not in shape.turn_keys:
        return ""
    if shape.roles.intersection(("human", "gpt")):
        beside = shape.image_key
        return "" if beside == "image" else "'conversations' from human and gpt, without 'image'"
    return f"{shape.image_key!r} beside 'conversations' of user and assistant" * bool(
        shape.image_key
    )


def sharegpt(_sample: Sequence[Row], columns: Mapping[str, str]) -> Read:
    """``{"messages": [{"role", "content"}, …], "images": […]}``, and its older spellings."""
    refuse_columns(columns, "sharegpt")

    def read(row: Row) -> Draft:
        key = "messages" if row.get("messages") is not None else "conversations"
        shelf = Shelf(row, "images", "image")
        turns = with_system(row, turns_of(row, key))
        return draft_of(row, turns, shelf, lambda turn: placeholders(turn, shelf))

    return read


def with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """The turns, after the row's own ``system`` prompt if it has one."""
    if not row.get("system"):
        return turns
    if turns and turns[0].role == "system":
        raise FieldError(
            "role_order",
            "the row has a system prompt both in 'system' and as its first turn",
            field="system",
            value=row["system"],
        )
    return [Turn("system", row["system"], "system"), *turns]


def is_openai(shape: Shape) -> str:
    """Why rows are messages as OpenAI's API takes them, or nothing."""
    if "messages" not in shape.lists or not shape.turn_keys.issuperset(("role", "content")):
        return ""
    if "image" in shape.parts or shape.image_key or is_swift_messages(shape):
        return ""
    if "image_url" in shape.parts:
        return "'messages' whose contents have parts of type image_url"
    if shape.says(IMAGE_MARK):
        return ""
    return "'messages' without images"


def openai(_sample: Sequence[Row], columns: Mapping[str, str]) -> Read:
    """``{"messages": [{"role", "content": [{"type": "image_url", …}, …]}, …]}``."""
    refuse_columns(columns, "openai")

    def read(row: Row) -> Draft:
        shelf = Shelf({})
        turns = with_system(row, turns_of(row, "messages"))
        draft = draft_of(row, turns, shelf, lambda turn: content_parts(turn, shelf))
        return replace(draft, field="messages")

    return read


def is_trl(shape: Shape) -> str:
    """Why rows are TRL's, or nothing."""
    if shape.has("prompt", "completion"):
        return "'prompt' and 'completion'"
    if "messages" not in shape.lists or not shape.turn_keys.issuperset(("role", "content")):
        return ""
    if "image_url" in shape.parts or is_swift_messages(shape):
        return ""
    if "image" in shape.parts:
        return "'messages' whose contents have parts of type image"
    if shape.image_key and not shape.says(IMAGE_MARK):
        return f"{shape.image_key!r} beside 'messages' without placeholders"
    return ""


def trl(_sample: Sequence[Row], columns: Mapping[str, str]) -> Read:
    """``{"messages": …, "images": […]}`` or ``{"prompt": …, "completion": …, "images": […]}``.

    Images without a part of their own stand before the first question, as TRL puts them.
    """
    refuse_columns(columns, "trl")

    def read(row: Row) -> Draft:
        shelf = Shelf(row, "images", "image")
        if row.get("messages") is not None:
            turns = turns_of(row, "messages")
        else:
            turns = [*_side(row, "prompt", "user"), *_side(row, "completion", "assistant")]
        if any(isinstance(turn.value, list) and _has_image(turn.value) for turn in turns):
            return draft_of(row, turns, shelf, lambda turn: content_parts(turn, shelf))
        first = next((turn for turn in turns if turn.role == "user"), None)

        def parts(turn: Turn) -> tuple[Part, ...]:
            before = shelf.take_all() if turn is first else ()
            return (*before, *content_parts(turn, shelf))

        return draft_of(row, turns, shelf, parts)

    return read


def _side(row: Row, key: str, role: Any) -> list[Turn]:
    value = cell(row, key)
    return turns_of(row, key) if isinstance(value, list) else [Turn(role, value, key)]


def _has_image(content: list[Any]) -> bool:
    return any(isinstance(part, Mapping) and part.get("type") == "image" for part in content)


def content_parts(turn: Turn, shelf: Shelf) -> tuple[Part, ...]:
    """A content that is a text, or a list of texts and images."""
    if not isinstance(turn.value, list):
        return (Text(turn.text),)
    return tuple(
        _content_part(part, shelf, f"{turn.field}[{number}]")
        for number, part in enumerate(turn.value)
    )


def _content_part(part: Any, shelf: Shelf, field: str) -> Text | Image:
    if isinstance(part, str):
        return Text(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind == "image":
        inline = next((part[key] for key in ("image", "url", "path") if part.get(key)), None)
        return shelf.take(field) if inline is None else shelf.add(inline)
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str) and url:
            return shelf.add(url)
    raise FieldError(
        "bad_part",
        f"{field} is of type {kind!r}; expected a text, an image or an image_url, with its content",
        field=field,
        value=part,
    )


def is_swift_messages(shape: Shape) -> bool:
    """Whether messages are such that only ms-swift's tools read them."""
    return "messages" in shape.lists and bool("objects" in shape.keys or shape.says(*SWIFT_MARKS))
