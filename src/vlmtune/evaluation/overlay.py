"""A picture as SVG with labelled boxes on it; no label hides another."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image as Picture

from vlmtune.data.labels import Rectangle, place_labels
from vlmtune.data.media import Size
from vlmtune.evaluation.markup import Html, tag

QUICK = 4  # level of compression, to see whether JPEG is smaller: four times as fast
SMALL_PNG = 96 * 1024  # bytes; a larger picture is tried as JPEG
COLOURS = (
    "#c2185b", "#1565c0", "#2e7d32", "#6a1b9a", "#a84300", "#00695c", "#b71c1c", "#37474f",
)  # fmt: skip
HEIGHT = 20.0  # of a label, in units of the drawing
PADDING = 6.0
LONGEST = 48  # characters of a label; its tooltip has all
MARGIN = 0.25  # of the picture: so far outside a box is still drawn


@dataclass(frozen=True, slots=True)
class Mark:
    """A box to draw, in pixels of the picture shown.

    Attributes:
        label: Its name; may be empty.
        xyxy: Its corners.
        colour: Of its line and label; None: the next of ``COLOURS``.
        dashed: Whether its line is.
    """

    label: str
    xyxy: tuple[float, float, float, float]
    colour: str | None = None
    dashed: bool = False


def data_uri(picture: Picture, *, exact: bool = False) -> str:
    """A picture as a data URI: PNG, or JPEG where that is smaller (never if ``exact``)."""
    encoded, kind = io.BytesIO(), "png"
    picture.save(encoded, "PNG", compress_level=QUICK)
    if encoded.tell() > SMALL_PNG and not exact:
        smaller = io.BytesIO()
        picture.save(smaller, "JPEG", quality=84, optimize=True)
        if smaller.tell() < encoded.tell():
            encoded, kind = smaller, "jpeg"
    if kind == "png":
        encoded = io.BytesIO()
        picture.save(encoded, "PNG", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"


def drawing(
    source: str,
    size: Size,
    marks: Sequence[Mark],
    *,
    scale: float = 1.0,
    cell: int = 0,
    alt: str = "",
) -> Html:
    """The picture with boxes and labels.

    Args:
        source: The picture's data URI.
        size: Its size in pixels; corners of marks are in these.
        marks: The boxes.
        scale: Units of the drawing a pixel, as large as it is shown where there is room.
        cell: Pixels between faint lines of a grid; 0 for none.
        alt: What the picture is, for those who cannot see it.
    """
    width, height = size.width * scale, size.height * scale
    boxes = [Rectangle(*(value * scale for value in mark.xyxy)) for mark in marks]
    canvas = _canvas(width, height, boxes)
    widths = [label_width(mark.label, canvas) for mark in marks]
    labels = place_labels(boxes, widths, HEIGHT, canvas)
    bottom = max([canvas.bottom, *(place.bottom + 2 for place in labels if place)])
    pixelated = "image-rendering: pixelated" if scale > 1 else None
    parts = [
        tag("title", alt) if alt else "",
        tag("image", href=source, width=_n(width), height=_n(height), style=pixelated),
        _grid(size, scale, cell),
    ]
    colours = [mark.colour or COLOURS[place % len(COLOURS)] for place, mark in enumerate(marks)]
    for mark, box, place, colour in zip(marks, boxes, labels, colours, strict=True):
        parts.append(_box(mark, box, place, colour))
    for mark, place, colour in zip(marks, labels, colours, strict=True):
        if place:
            parts.append(_label(mark, place, colour))
    across, down = canvas.right - canvas.left, bottom - canvas.top
    return tag(
        "svg",
        *parts,
        viewBox=f"{_n(canvas.left)} {_n(canvas.top)} {_n(across)} {_n(down)}",
        width=_n(across),
        height=_n(down),
        role="img",
    )


def _canvas(width: float, height: float, boxes: Sequence[Rectangle]) -> Rectangle:
    """The picture and what of the boxes lies near it."""
    left, top, right, bottom = 0.0, 0.0, width, height
    for box in boxes:
        left, right = min(left, box.left, box.right), max(right, box.left, box.right)
        top, bottom = min(top, box.top, box.bottom), max(bottom, box.top, box.bottom)
    wide, high = width * MARGIN, height * MARGIN
    return Rectangle(
        max(left, -wide), max(top, -high), min(right, width + wide), min(bottom, height + high)
    )


def label_width(label: str, canvas: Rectangle) -> float:
    """Width of a label that is at most as wide as the canvas; 0 for none."""
    room = canvas.right - canvas.left
    if not label:
        return 0.0
    return min(text_width(shortened(label, room - 2 * PADDING)) + 2 * PADDING, room)


def shortened(label: str, room: float) -> str:
    """A label that is at most a line long and fits into ``room``."""
    short = label if len(label) <= LONGEST else label[: LONGEST - 1] + "…"
    while len(short) > 1 and text_width(short) > room:
        short = short[:-2] + "…"
    return short


def text_width(text: str) -> float:
    """Width of a text of 13 units, rather too much than too little."""
    return sum(
        13.4
        if unicodedata.east_asian_width(c) in "WF" or c in "mwMW"
        else 8.4
        if c.islower()
        else 10
        for c in text
    )


def _grid(size: Size, scale: float, cell: int) -> Html:
    if not cell:
        return Html("")
    width, height = size.width * scale, size.height * scale
    down = "".join(f"M{_n(x * scale)} 0V{_n(height)}" for x in range(cell, size.width, cell))
    across = "".join(f"M0 {_n(y * scale)}H{_n(width)}" for y in range(cell, size.height, cell))
    return tag("path", d=down + across, class_="cells") if down + across else Html("")


def _box(mark: Mark, box: Rectangle, place: Rectangle | None, colour: str) -> Html:
    left, right = sorted((box.left, box.right))
    top, bottom = sorted((box.top, box.bottom))
    frame = {
        "x": _n(left),
        "y": _n(top),
        "width": _n(max(right - left, 1)),
        "height": _n(max(bottom - top, 1)),
        "fill": "none",
    }
    line = Html("")
    if place is not None and not place.touches(
        Rectangle(left - 1, top - HEIGHT, right + 1, bottom + HEIGHT)
    ):
        middle = (place.left + place.right) / 2
        to = min(max(middle, left), right)
        d = f"M{_n(middle)} {_n(place.top)}L{_n(to)} {_n(bottom)}"
        line = tag("path", d=d, stroke=colour, stroke_width="1.5", stroke_dasharray="4 3")
    return tag(
        "g",
        tag("rect", **frame, stroke="#fff", stroke_width="4.5", stroke_opacity=".85"),
        tag(
            "rect",
            tag("title", mark.label),
            **frame,
            stroke=colour,
            stroke_width="2.5",
            stroke_dasharray="7 4" if mark.dashed else None,
        ),
        line,
        class_="box",
    )


def _label(mark: Mark, place: Rectangle, colour: str) -> Html:
    return tag(
        "g",
        tag("title", mark.label),
        tag(
            "rect",
            x=_n(place.left),
            y=_n(place.top),
            width=_n(place.right - place.left),
            height=_n(HEIGHT),
            rx="3",
            fill=colour,
        ),
        tag(
            "text",
            shortened(mark.label, place.right - place.left - 2 * PADDING + 0.01),
            x=_n(place.left + PADDING),
            y=_n(place.top + 14.5),
            class_="label",
        ),
    )


def _n(value: float) -> str:
    """A number as SVG likes it: no more digits than can be seen."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
