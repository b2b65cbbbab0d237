"""Pictures of coloured shapes, and what can be said about them in plain words."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "bar")
COLOURS = {
    "red": (214, 39, 40), "green": (44, 150, 44), "blue": (31, 90, 200), "yellow": (235, 200, 30),
    "purple": (140, 60, 170), "orange": (250, 130, 20), "black": (20, 20, 20),
    "gray": (130, 130, 130),
}  # fmt: skip
FINE = 3  # drawn so many times larger, then averaged
_Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape.

    Attributes:
        kind: One of ``SHAPES``.
        colour: A key of ``COLOURS``.
        box: Left, top, right, bottom in pixels.
    """

    kind: str
    colour: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> _Point:
        """Middle of the box in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes that do not overlap, no two of the same kind.

    Attributes:
        width: Pixels.
        height: Pixels.
        shapes: From left to right.
    """

    width: int
    height: int
    shapes: tuple[Shape, ...]


def random_scene(rng: random.Random, count: int, *, sides: tuple[int, ...] = (112, 140)) -> Scene:
    """A scene of ``count`` shapes of different kinds; fewer if there is no room."""
    width, height = rng.choice(sides), rng.choice(sides)
    kinds, shapes = rng.sample(SHAPES, count), list[Shape]()
    for kind in kinds:
        for _ in range(50):
            side = rng.randint(22, 60 if count < 3 else 44)
            left, top = rng.randint(0, width - side), rng.randint(0, height - side)
            box = (left, top, left + side, top + side)
            if all(_apart(box, other.box) for other in shapes):
                shapes.append(Shape(kind, rng.choice(tuple(COLOURS)), box))
                break
    return Scene(width, height, tuple(sorted(shapes, key=lambda shape: shape.centre)))


def draw_scene(scene: Scene) -> NDArray[np.uint8]:
    """The picture ``(height, width, 3)``, shapes on white."""
    image = Image.new("RGB", (scene.width * FINE, scene.height * FINE), "white")
    pen = ImageDraw.Draw(image)
    for shape in scene.shapes:
        _draw(pen, shape)
    return np.asarray(image.reduce(FINE))


def relation(first: Shape, second: Shape) -> str:
    """Where the first lies, seen from the second."""
    across = first.centre[0] - second.centre[0]
    down = first.centre[1] - second.centre[1]
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def described(scene: Scene) -> str:
    """The shapes in plain words: ``a red circle left of a blue square``."""
    names = [_named(shape) for shape in scene.shapes]
    if len(names) == 1:
        return names[0]
    first = f"{names[0]} {relation(*scene.shapes[:2])} {names[1]}"
    return " and ".join((first, *names[2:]))


def _named(shape: Shape) -> str:
    article = "an" if shape.colour[0] in "aeiou" else "a"
    return f"{article} {shape.colour} {shape.kind}"


def spans(scene: Scene, order: Sequence[Shape] = ()) -> str:
    """Where each shape reaches, in percent of the picture, in plain words.

    Args:
        scene: The scene.
        order: Its shapes in the order to name them; empty: from left to right.
    """
    said = []
    for shape in order or scene.shapes:
        left, top, right, bottom = _percent(shape, scene)
        said.append(
            f"{shape.colour} {shape.kind} from {left} across {top} down "
            f"to {right} across {bottom} down"
        )
    return " and ".join(said)


def reach(shape: Shape, scene: Scene) -> str:
    """Where one of them reaches, as ``left:04 top:29 right:25 bottom:50``."""
    sides = zip(("left", "top", "right", "bottom"), _percent(shape, scene), strict=True)
    return " ".join(f"{name}:{side}" for name, side in sides)


def shares(shape: Shape, scene: Scene) -> tuple[float, ...]:
    """Left, top, right and bottom of one of them as shares of the picture."""
    wholes = (scene.width, scene.height) * 2
    return tuple(x / whole for x, whole in zip(shape.box, wholes, strict=True))


def cells(shape: Shape, scene: Scene, side: int) -> tuple[int, ...]:
    """Squares of ``side`` pixels, counted row by row, whose middle lies in a shape's box.

    If there is none, the one in which its own middle lies.
    """
    left, top, right, bottom = shape.box
    across, down = scene.width // side, scene.height // side
    inside = tuple(
        row * across + column
        for row in range(down)
        for column in range(across)
        if left <= (column + 0.5) * side < right and top <= (row + 0.5) * side < bottom
    )
    x, y = shape.centre
    return inside or (int(y // side) * across + int(x // side),)


def _percent(shape: Shape, scene: Scene) -> list[str]:
    return [f"{min(99, round(100 * share)):02d}" for share in shares(shape, scene)]


def _apart(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


def _draw(pen: ImageDraw.ImageDraw, shape: Shape) -> None:
    left, top, right, bottom = (FINE * side for side in shape.box)
    fill, size = COLOURS[shape.colour], right - left
    box = (left, top, right - 1, bottom - 1)
    x, y = (left + right) / 2, (top + bottom) / 2
    if shape.kind == "circle":
        pen.ellipse(box, fill=fill)
    elif shape.kind == "ring":
        pen.ellipse(box, outline=fill, width=size // 5)
    elif shape.kind == "square":
        pen.rectangle(box, fill=fill)
    elif shape.kind == "bar":
        pen.rectangle((left, y - size / 6, right - 1, y + size / 6), fill=fill)
        pen.rectangle((left, top, left + size / 12, bottom - 1), fill=fill)
        pen.rectangle((right - size / 12, top, right - 1, bottom - 1), fill=fill)
    elif shape.kind == "cross":
        pen.rectangle((left, y - size / 8, right - 1, y + size / 8), fill=fill)
        pen.rectangle((x - size / 8, top, x + size / 8, bottom - 1), fill=fill)
    elif shape.kind == "triangle":
        pen.polygon([(x, top), (right - 1, bottom - 1), (left, bottom - 1)], fill=fill)
    elif shape.kind == "diamond":
        pen.polygon([(x, top), (right - 1, y), (x, bottom - 1), (left, y)], fill=fill)
    else:
        pen.polygon(_star(x, y, size / 2), fill=fill)


def _star(x: float, y: float, radius: float) -> list[_Point]:
    points = []
    for corner in range(10):
        reach = radius if corner % 2 == 0 else 0.42 * radius
        angle = math.pi * corner / 5
        points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
    return points
