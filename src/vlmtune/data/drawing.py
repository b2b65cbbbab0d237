"""Labelled boxes drawn on a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.Image import Image as Picture

from vlmtune.data.conversation import Box
from vlmtune.data.labels import Rectangle, place_labels
from vlmtune.data.media import Size

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f",
    "#bcbd22", "#17becf",
)  # fmt: skip
SMALLEST_FONT = 15
# Pillow's own font is Latin. These are looked for by name where fonts are installed.
WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "simsun.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
)
LAST_LATIN = "\u024f"


@dataclass(frozen=True, slots=True)
class Shape:
    """One box as it is drawn, in pixels of the picture.

    Attributes:
        corners: Left, top, right, bottom, cut to whole pixels.
        colour: Of its line, as ``#rrggbb``.
        label: What its label says; may be empty, or shortened.
        place: Where its label stands.
    """

    corners: tuple[int, int, int, int]
    colour: str
    label: str
    place: Rectangle | None


def font_size(size: Size) -> int:
    """Pixels of a label's letters on a picture of ``size``."""
    return max(int(math.sqrt(size.width * size.height) // 30), SMALLEST_FONT)


def line_width(size: Size) -> float:
    """Pixels of a box's line on a picture of ``size``."""
    return max(font_size(size) / 4, 1)


def draw_boxes(
    picture: Picture,
    boxes: Sequence[Box],
    *,
    font: str | Path | None = None,
    colours: Sequence[str] = (),
) -> Picture:
    """A copy of a picture with boxes and their labels on it.

    Two labels never hide each other; where a picture has no room left for one, white room is added
    below. Characters that no installed font has come out as empty frames.

    Args:
        picture: Any picture; the copy is RGB.
        boxes: Boxes in its pixels, whatever ``Box.image`` says.
        font: A TrueType or OpenType file; without one, what is installed.
        colours: Of the boxes, each ``#rrggbb``; without them, one for each label in turn.

    Raises:
        OSError: If ``font`` cannot be read.
    """
    size = Size(*picture.size)
    letters = load_font(font_size(size), "".join(box.label for box in boxes), font)
    shapes = arrange(size, boxes, letters.getlength, label_height(letters, size))
    if colours:
        shapes = [replace(one, colour=own) for one, own in zip(shapes, colours, strict=True)]
    places = [shape.place for shape in shapes if shape.place]
    bottom = max([size.height, *(math.ceil(place.bottom) for place in places)])
    drawn = Image.new("RGB", (size.width, bottom), "white")
    drawn.paste(picture.convert("RGB"))
    brush = ImageDraw.Draw(drawn, "RGBA")
    for shape in shapes:
        brush.rectangle(
            _upright(shape.corners), outline=shape.colour, width=round(line_width(size))
        )
    for shape in shapes:
        if shape.place is not None:
            brush.rectangle(shape.place, fill=(0, 0, 0, 204))
            corner = (shape.place.left + _padding(size), shape.place.top + _padding(size))
            brush.text(corner, shape.label, fill=lightened(shape.colour), font=letters)
    return drawn


def arrange(
    size: Size, boxes: Sequence[Box], measure: Callable[[str], float], height: float
) -> list[Shape]:
    """Colours, whole pixels, and places of labels; a box without a label has the last one's colour.

    Args:
        size: Of the picture.
        boxes: In its pixels.
        measure: Width of a text in pixels.
        height: Height of a label.
    """
    padding = 2 * _padding(size)
    labels = [_shortened(box.label, size.width - padding, measure) for box in boxes]
    widths = [min(measure(label) + padding, size.width) if label else 0.0 for label in labels]
    corners = [_whole(box.xyxy, size) for box in boxes]
    places = place_labels(
        [Rectangle(*each) for each in corners],
        widths,
        height,
        Rectangle(0, 0, size.width, size.height),
        inside=True,
    )
    shapes = []
    colour = -1
    for corner, label, place in zip(corners, labels, places, strict=True):
        if label or colour < 0:
            colour += 1
        shapes.append(Shape(corner, COLOURS[colour % len(COLOURS)], label, place))
    return shapes


def label_height(font: Font, size: Size) -> float:
    """Height of every label, so that the letters of any fit."""
    _, top, _, bottom = font.getbbox("Ég狗")
    return bottom + max(top, 0) / 2 + 2 * _padding(size)


def lightened(colour: str) -> Colour:
    """A line's colour as letters on black: no channel below 0.2, the strongest at least 0.8."""
    channels = [max(value, 51) for value in ImageColor.getrgb(colour)[:3]]
    strongest = channels.index(max(channels))
    channels[strongest] = max(channels[strongest], 204)
    red, green, blue = channels
    return red, green, blue


def load_font(size: int, text: str, path: str | Path | None = None) -> Font:
    """A font for a text: the given one, Pillow's own for Latin, an installed one for the rest."""
    if path is not None:
        return ImageFont.truetype(str(path), size)
    found = None if max(text, default=" ") <= LAST_LATIN else _wide_font()
    return ImageFont.load_default(size) if found is None else ImageFont.truetype(found, size)


@cache
def _wide_font() -> str | None:
    """File of the first installed font with more than Latin letters; looking walks folders."""
    for name in WIDE_FONTS:
        try:
            path = ImageFont.truetype(name, SMALLEST_FONT).path
        except OSError:
            continue
        return path if isinstance(path, str) else None
    return None


def _padding(size: Size) -> int:
    return max(font_size(size) // 10, 1)


def _shortened(label: str, room: float, measure: Callable[[str], float]) -> str:
    """A label on one line that fits into ``room``, or its first letter."""
    short = " ".join(label.split())
    if measure(short) <= room:
        return short
    while len(short) > 1 and measure(short + "…") > room:
        short = short[:-1]
    return short + "…"


def _whole(xyxy: tuple[float, float, float, float], size: Size) -> tuple[int, int, int, int]:
    """Corners in whole pixels, within a picture's width of it, so that any model's box is drawn."""
    x1, y1, x2, y2 = xyxy
    wide, high = size.width, size.height
    return (
        int(min(max(x1, -wide), 2 * wide)),
        int(min(max(y1, -high), 2 * high)),
        int(min(max(x2, -wide), 2 * wide)),
        int(min(max(y2, -high), 2 * high)),
    )


def _upright(corners: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Pillow refuses a rectangle whose right is left of its left."""
    x1, y1, x2, y2 = corners
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
