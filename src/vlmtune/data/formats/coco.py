"""COCO's captions and boxes: a row an image, as ``data.layouts`` joins them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.data.conversation import Box, Image, Message
from vlmtune.data.formats.draft import Draft, Read, Row, as_text, cell, identity, refuse_columns
from vlmtune.data.formats.shape import Shape
from vlmtune.data.formats.swift import four_numbers
from vlmtune.data.media import Size
from vlmtune.data.sources import FieldError


def is_coco(shape: Shape) -> str:
    """Why rows are COCO's, or nothing."""
    if not shape.has("annotations", "file_name"):
        return ""
    return "each image has 'file_name' and 'annotations' (captions or boxes)"


def coco(_sample: Sequence[Row], columns: Mapping[str, str]) -> Read:
    """An image's captions are all references; or its boxes, in the file's order, are the answer."""
    refuse_columns(columns, "coco")
    return _read


def _read(row: Row) -> Draft:
    found = cell(row, "annotations")
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise FieldError("bad_row", "'annotations' is no list of objects", field="annotations")
    if "file_name" not in row:
        raise FieldError(
            "missing_field",
            f"{len(found)} annotations are of the image {row.get('image_id')!r}, which 'images' "
            "does not list",
            field="file_name",
        )
    captions = [as_text(one["caption"]) for one in found if "caption" in one]
    crowds = sum(bool(one.get("iscrowd")) for one in found)
    boxes = [
        _box(one, f"annotations[{number}]")
        for number, one in enumerate(found)
        if not one.get("iscrowd") and "caption" not in one
    ]
    references = tuple(caption for caption in captions if caption.strip())
    if not references and not boxes:
        raise FieldError(
            "empty_answer",
            f"the image has no caption and no box ({crowds} crowds were left out)",
            field="annotations",
        )
    if references and boxes:
        raise FieldError(
            "bad_row",
            "the image has captions and boxes; expected one kind of answer",
            field="annotations",
        )
    messages = [Message("user", (Image(0),))]
    if boxes:
        messages.append(Message("assistant", tuple(boxes)))
    return Draft(
        tuple(messages),
        (row["file_name"],),
        references,
        id=identity(row),
        field="file_name",
        size=_size(row) if boxes else None,
        notes=(f"{crowds} crowd annotations left out",) if crowds else (),
    )


def _box(annotation: Mapping[str, Any], field: str) -> Box:
    x, y, width, height = four_numbers(annotation.get("bbox"), f"{field}.bbox")
    label = annotation.get("category")
    if not isinstance(label, str) or not label:
        raise FieldError(
            "missing_field",
            f"{field} is of category {annotation.get('category_id')!r}, which 'categories' does "
            "not name",
            field=f"{field}.category_id",
        )
    return Box(0, label, (x, y, x + width, y + height))


def _size(row: Row) -> Size | None:
    width, height = row.get("width"), row.get("height")
    if isinstance(width, int) and isinstance(height, int):
        return Size(width, height)
    return None
