"""Boxes as Qwen-VL writes them: ``<ref>phrase</ref><box>(x1,y1),(x2,y2)</box>``, integers 0 … 999.

Several boxes may follow one phrase; the first is called by it, the others have no label, as in
the other families that name a box by the phrase directly before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmtune.data.boxes import Corners, from_grid, to_grid
from vlmtune.data.conversation import Box, Part, Text
from vlmtune.data.drawing import draw_boxes
from vlmtune.data.media import Size
from vlmtune.models.family import Piece
from vlmtune.models.qwen_vl.markup import TAG, elements

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

GRID = 1000

_NUMBER = r"\s{0,9}(\d{1,6})\s{0,9}"
_POINT = rf"\s{{0,9}}\({_NUMBER},{_NUMBER}\)\s{{0,9}}"
_PATTERNS = {
    "box": re.compile(",".join([_POINT] * 2)),
    "quad": re.compile(",".join([_POINT] * 4)),
}


def render_box(box: Box, size: Size) -> list[Piece]:
    """A box with its phrase; ``size`` is that of its upright image."""
    x1, y1, x2, y2 = to_grid(box.xyxy, size, GRID)
    label = []
    if box.label:
        label = [Piece("<ref>", control=True), Piece(box.label), Piece("</ref>", control=True)]
    return [
        *label,
        Piece("<box>", control=True),
        Piece(f"({x1},{y1}),({x2},{y2})"),
        Piece("</box>", control=True),
    ]


def parse_boxes(text: str, sizes: Sequence[Size]) -> list[Box]:
    """All boxes of an answer; they lie on the latest picture. What is no box is passed over.

    A quadrangle counts as the smallest box around it.

    Args:
        text: A model's raw answer, control tokens kept.
        sizes: Sizes in pixels of the conversation's upright images.
    """
    if not sizes:
        return []
    boxes: list[Box] = []
    label = ""
    for tag, content in elements(text):
        corners = _corners(tag, content)
        if corners is not None:
            xyxy = from_grid(corners, sizes[-1], GRID)
            boxes.append(Box(image=len(sizes) - 1, label=label, xyxy=xyxy))
        label = content if tag == "ref" else ""
    return boxes


def answer_parts(text: str, sizes: Sequence[Size]) -> tuple[Part, ...]:
    """An answer as the parts of a turn, so that its boxes are boxes again where it is history.

    What is no box, quadrangles included, stays text.
    """
    parts: list[Part] = []
    phrase: str | None = None
    for tag, content in elements(text):
        corners = _corners(tag, content) if tag == "box" and sizes else None
        if corners is None:
            parts.append(Text(f"<{tag}>{content}</{tag}>" if tag else content))
            phrase = content if tag == "ref" else None
            continue
        if phrase:
            parts.pop()
        xyxy = from_grid(corners, sizes[-1], GRID)
        parts.append(Box(image=len(sizes) - 1, label=phrase or "", xyxy=xyxy))
        phrase = None
    return tuple(parts)


def readable(text: str) -> str:
    """An answer, finished or not, without tags and coordinates: what people read."""
    kept = "".join(content for tag, content in elements(text) if tag in ("", "ref"))
    for tag in ("<box>", "<quad>"):  # one that is still being written
        kept = kept.split(tag)[0]
    return TAG.sub("", kept)


def draw_on_latest(
    answer: str, pictures: Sequence[Picture], *, font: str | Path | None = None
) -> Picture | None:
    """The boxes of an answer on the conversation's latest picture.

    Args:
        answer: A model's raw answer, control tokens kept.
        pictures: The conversation's upright pictures.
        font: A font file for the labels; see ``draw_boxes``.

    Returns:
        A new picture, or None where there is no picture or no box.
    """
    boxes = parse_boxes(answer, [Size(*picture.size) for picture in pictures])
    return draw_boxes(pictures[-1], boxes, font=font) if boxes else None


def _corners(tag: str, content: str) -> Corners | None:
    pattern = _PATTERNS.get(tag)
    found = pattern.fullmatch(content) if pattern else None
    if found is None:
        return None
    values = [float(value) for value in found.groups()]
    if tag == "box":
        return values[0], values[1], values[2], values[3]
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
