"""ms-swift's rows, with boxes beside the text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlmtune.data.boxes import Corners
from vlmtune.data.conversation import Box, Part, Text
from vlmtune.data.formats.chat import SWIFT_MARKS, is_swift_messages, with_system
from vlmtune.data.formats.draft import Draft, Read, Row, as_list, cell, refuse_columns
from vlmtune.data.formats.shape import Shape
from vlmtune.data.formats.turns import IMAGE_MARK, Shelf, Turn, draft_of, turns_of
from vlmtune.data.sources import FieldError

_MARK = re.compile(r"(<image>|<ref-object>|<bbox>|<img>[^<>\n]+</img>)")
# What width and height count in a box: nothing (pixels), or one.
SCALES: dict[str, float | None] = {"real": None, "norm1": 1.0}


def is_ms_swift(shape: Shape) -> str:
    """Why rows are ms-swift's, or nothing."""
    if shape.has("query", "response"):
        return "'query' and 'response'"
    if not is_swift_messages(shape):
        return ""
    mark = shape.says(*SWIFT_MARKS)
    return f"'messages' with {mark}" if mark else "'objects' beside 'messages'"


def ms_swift(_sample: Sequence[Row], columns: Mapping[str, str]) -> Read:
    """``{"messages": …, "images": […], "objects": {…}}`` or ``{"query", "response", "history"}``.

    ``<ref-object>`` directly before ``<bbox>`` names the box; alone it is its phrase. Images
    without a placeholder stand before the first question, as ms-swift puts them.
    """
    refuse_columns(columns, "ms-swift")

    def read(row: Row) -> Draft:
        turns = turns_of(row, "messages") if row.get("messages") else _from_pairs(row)
        turns = with_system(row, turns)
        shelf, objects = Shelf(row, "images", "image"), _Objects(row.get("objects"))
        placed = sum(t.value.count(IMAGE_MARK) for t in turns if isinstance(t.value, str))
        unplaced = max(0, shelf.left - placed)
        first = next((turn for turn in turns if turn.role == "user"), None)

        def parts(turn: Turn) -> Iterator[Part]:
            if turn is first:
                yield from (shelf.take(turn.field) for _ in range(unplaced))
            yield from _parts(turn, shelf, objects)

        draft = draft_of(row, turns, shelf, parts)
        objects.check()
        return replace(draft, box_scale=objects.scale)

    return read


def _from_pairs(row: Row) -> list[Turn]:
    """The turns of ``history``, ``query`` and ``response``."""
    turns: list[Turn] = []
    for number, pair in enumerate(as_list(row.get("history"))):
        field = f"history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise FieldError(
                "bad_row", f"{field} is no pair of a query and a response", field=field, value=pair
            )
        turns += (Turn("user", pair[0], f"{field}[0]"), Turn("assistant", pair[1], f"{field}[1]"))
    return [
        *turns,
        Turn("user", cell(row, "query"), "query"),
        Turn("assistant", cell(row, "response"), "response"),
    ]


class _Objects:
    """The phrases and boxes of a row, handed out in the order of their placeholders."""

    def __init__(self, objects: Any) -> None:
        fields = objects if isinstance(objects, Mapping) else {}
        if objects is not None and not isinstance(objects, Mapping):
            raise FieldError("bad_row", "'objects' is no object", field="objects", value=objects)
        self._phrases = as_list(fields.get("ref"))
        self._boxes = as_list(fields.get("bbox"))
        self._images = as_list(fields.get("image_id"))
        self._used = [0, 0]
        kind = fields.get("bbox_type") or "real"
        if kind not in SCALES:
            raise FieldError(
                "bad_box",
                f"'bbox_type' is {kind!r}; expected one of {', '.join(SCALES)}",
                field="objects.bbox_type",
                value=kind,
            )
        self.scale = SCALES[kind]
        if self._images and len(self._images) != len(self._boxes):
            self._mismatch("image_id", len(self._images), len(self._boxes))

    def phrase(self) -> str:
        """The next phrase."""
        return str(self._next(0, self._phrases, "ref"))

    def box(self, label: str) -> Box:
        """The next box; malformed ones are found here, those outside of the image are not."""
        corners = self._next(1, self._boxes, "bbox")
        number = self._used[1] - 1
        image = self._images[number] if self._images else 0
        if not isinstance(image, int):
            raise FieldError(
                "bad_box",
                f"'image_id' holds {image!r}; expected the number of an image, from 0 on",
                field="objects.image_id",
                value=image,
            )
        return Box(image, label, four_numbers(corners, f"objects.bbox[{number}]"))

    def _next(self, which: int, values: Sequence[Any], name: str) -> Any:
        if self._used[which] == len(values):
            self._mismatch(name, len(values), len(values) + 1)
        self._used[which] += 1
        return values[self._used[which] - 1]

    def check(self) -> None:
        """Raise ``box_mismatch`` if something has no placeholder."""
        for which, (name, values) in enumerate((("ref", self._phrases), ("bbox", self._boxes))):
            if self._used[which] != len(values):
                self._mismatch(name, len(values), self._used[which])

    def _mismatch(self, name: str, have: int, need: int) -> None:
        raise FieldError(
            "box_mismatch",
            f"'objects' has {have} in {name!r}, but {need} (or more) are placed; expected as many "
            "<ref-object> as phrases and <bbox> as boxes",
            field=f"objects.{name}",
        )


def four_numbers(value: Any, field: str) -> Corners:
    """A box as four numbers.

    Raises:
        FieldError: ``bad_box``.
    """
    numbers = [float(n) for n in as_list(value) if type(n) in (int, float) and abs(n) < 1e12]
    if len(numbers) != 4 or len(as_list(value)) != 4:
        raise FieldError(
            "bad_box",
            f"{field} is {str(value)[:80]}; expected four finite numbers (points are no boxes)",
            field=field,
            value=value,
        )
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _parts(turn: Turn, shelf: Shelf, objects: _Objects) -> Iterator[Part]:
    # re.split with one group: text, mark, text, mark, …, text
    pieces = [piece for piece in _MARK.split(turn.text) if piece]
    label = ""
    for number, piece in enumerate(pieces):
        if piece == "<bbox>":
            yield objects.box(label)
            continue
        label = ""
        if piece == "<ref-object>":
            phrase = objects.phrase()
            if pieces[number + 1 : number + 2] == ["<bbox>"]:
                label = phrase
            else:
                yield Text(phrase)
        elif piece == IMAGE_MARK:
            yield shelf.take(turn.field)
        elif _MARK.fullmatch(piece):
            yield shelf.add(piece.removeprefix("<img>").removesuffix("</img>"))
        else:
            yield Text(piece)
