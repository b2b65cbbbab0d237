"""Where the labels of boxes stand so that none hides another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Rectangle(NamedTuple):
    """Left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float

    def touches(self, other: Rectangle) -> bool:
        """Whether two rectangles have area in common."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def place_labels(
    boxes: Sequence[Rectangle],
    widths: Sequence[float],
    height: float,
    canvas: Rectangle,
    *,
    inside: bool = False,
) -> list[Rectangle | None]:
    """A place for every label with a width: at its box if there is room, below all if not.

    Args:
        boxes: The boxes.
        widths: The width of each box's label; 0 for none, at most that of the canvas.
        height: Height of every label.
        canvas: Where labels may stand; only those without room stand below it.
        inside: Whether the best place is within the box's upper left corner, not above it.
    """
    placed: list[Rectangle | None] = []
    taken: list[Rectangle] = []
    for box, width in zip(boxes, widths, strict=True):
        if not width:
            placed.append(None)
            continue
        places = _places(box, width, height, canvas, inside)
        place = next(place for place in places if not any(place.touches(other) for other in taken))
        taken.append(place)
        placed.append(place)
    return placed


def _places(
    box: Rectangle, width: float, height: float, canvas: Rectangle, inside: bool
) -> Iterator[Rectangle]:
    """Places for a label, the best first; ends never, as there is always room below."""
    left, right = sorted((box.left, box.right))
    top, bottom = sorted((box.top, box.bottom))
    corners = [
        (left, top - height),
        (left, top),
        (right - width, top - height),
        (left, bottom),
        (left, bottom - height),
        (right - width, bottom),
        (right - width, top),
    ]
    if inside:
        corners[:2] = reversed(corners[:2])
    for x, y in corners:
        if canvas.top <= y <= canvas.bottom - height:
            yield _at(x, y, width, height, canvas)
    y = max(top, canvas.top)
    while y + height <= min(bottom, canvas.bottom):
        yield _at(left, y, width, height, canvas)
        y += height / 2
    y = canvas.bottom + 2
    while True:
        x = canvas.left
        while x + width <= canvas.right + 0.01:
            yield Rectangle(x, y, x + width, y + height)
            x += height
        y += height + 2


def _at(x: float, y: float, width: float, height: float, canvas: Rectangle) -> Rectangle:
    x = max(canvas.left, min(x, canvas.right - width))
    return Rectangle(x, y, x + width, y + height)
