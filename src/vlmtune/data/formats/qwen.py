"""Lists of conversations as Qwen's own tools and tutorials write them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlmtune.data.conversation import Part, Text
from vlmtune.data.formats.draft import Draft, Read, Row, refuse_columns
from vlmtune.data.formats.qwen_markup import GRID, parse
from vlmtune.data.formats.shape import Shape
from vlmtune.data.formats.turns import (
    Shelf,
    Turn,
    draft_of,
    turns_of,
    without_leading_answer,
)

_IMAGE_MARK = re.compile(r"<\|vision_start\|>(.*?)<\|vision_end\|>", re.DOTALL)
_IMAGE_FILE = re.compile(r"[^\n]+\.(png|jpe?g|gif|webp|bmp|tiff?|ppm|pgm|jp2|avif)", re.IGNORECASE)
_TAGS = ("<img>", "<box>", "<ref>")


def is_tutorial_ocr(shape: Shape) -> str:
    """Why rows are the OCR tutorial's, or nothing."""
    if "conversations" not in shape.lists or not shape.turn_keys.issuperset(("role", "value")):
        return ""
    if not any(_IMAGE_FILE.fullmatch(text.strip()) for text in shape.user_texts):
        return ""
    return "'conversations' with 'role' and 'value', where the user's whole text is an image file"


def tutorial_ocr(_sample: Sequence[Row], columns: Mapping[str, str]) -> Read:
    """``{"conversations": [{"role": "user", "value": PATH}, …]}``: the user shows an image."""
    refuse_columns(columns, "tutorial-ocr")

    def read(row: Row) -> Draft:
        shelf = Shelf({})

        def parts(turn: Turn) -> tuple[Part, ...]:
            if turn.role != "user" or not turn.text.strip():
                return (Text(turn.text),)
            return (shelf.add(turn.text),)

        return draft_of(row, turns_of(row, "conversations"), shelf, parts)

    return read


def is_tutorial_caption(shape: Shape) -> str:
    """Why rows are the caption tutorial's, or nothing."""
    marked = any(_IMAGE_MARK.search(text) for text in shape.user_texts)
    if "conversations" not in shape.lists or "from" not in shape.turn_keys or not marked:
        return ""
    return "'conversations' with 'from' and 'value', images in <|vision_start|>…<|vision_end|>"


def tutorial_caption(_sample: Sequence[Row], columns: Mapping[str, str]) -> Read:
    """``{"conversations": [{"from": "user", "value": TEXT WITH IMAGES IN VISION MARKS}, …]}``."""
    refuse_columns(columns, "tutorial-caption")

    def read(row: Row) -> Draft:
        shelf = Shelf({})

        def parts(turn: Turn) -> tuple[Part, ...]:
            if turn.role != "user":
                return (Text(turn.text),)
            # re.split with one group: text, path, text, path, …, text
            pieces = enumerate(_IMAGE_MARK.split(turn.text))
            return tuple(
                shelf.add(piece.strip()) if number % 2 else Text(piece) for number, piece in pieces
            )

        return draft_of(row, turns_of(row, "conversations"), shelf, parts)

    return read


def is_qwen_vl(shape: Shape) -> str:
    """Why rows are Qwen-VL's, or nothing."""
    if "conversations" not in shape.lists or not shape.turn_keys.issuperset(("from", "value")):
        return ""
    if not shape.roles.issubset(("user", "assistant", "system")) or shape.image_key:
        return ""
    if shape.says("<|vision_start|>"):
        return ""
    tag = shape.says(*_TAGS)
    inside = f"with {tag} inside the texts" if tag else "without images"
    return f"'conversations' with 'from' user and assistant, {inside}"


def qwen_vl(_sample: Sequence[Row], columns: Mapping[str, str]) -> Read:
    """``{"conversations": [{"from": "user", "value": "Picture 1: <img>PATH</img>…"}, …]}``.

    The text form is described in ``qwen_markup``. As in Qwen-VL's own training, an answer before
    the first question is left out.
    """
    refuse_columns(columns, "qwen-vl")

    def read(row: Row) -> Draft:
        turns, notes = without_leading_answer(turns_of(row, "conversations"))
        shelf, images, said = Shelf(row), list[str](), list[str]()

        def parts(turn: Turn) -> tuple[Part, ...]:
            before = len(images)
            found, remarks = parse(turn.text, images, turn.field)
            said.extend(remarks)
            for image in images[before:]:
                shelf.add(image)
            return found

        draft = draft_of(row, turns, shelf, parts)
        return replace(draft, box_scale=GRID, notes=(*notes, *said))

    return read
