"""Boxes between pixels and a model's integer grid.

Inside vlmtune a box is float64 pixels of the upright original image. A grid of ``n`` divides width
and height into ``n`` steps; the inverse of a grid value is exact enough that rendering what was
parsed gives back the same integers, for every integer of the grid.
"""

from __future__ import annotations

from vlmtune.data.media import Size

Corners = tuple[float, float, float, float]


def to_grid(xyxy: Corners, size: Size, grid: int) -> tuple[int, int, int, int]:
    """Pixels to integers in ``0 … grid - 1``.

    Args:
        xyxy: ``(x1, y1, x2, y2)`` in pixels of the upright image.
        size: The upright image's size in pixels.
        grid: Steps an axis, e.g. 1000.
    """
    scaled = (
        xyxy[0] * grid / size.width,
        xyxy[1] * grid / size.height,
        xyxy[2] * grid / size.width,
        xyxy[3] * grid / size.height,
    )
    x1, y1, x2, y2 = (min(max(round(value), 0), grid - 1) for value in scaled)
    return x1, y1, x2, y2


def from_grid(values: Corners, size: Size, grid: float) -> Corners:
    """Values of a grid to float pixels of the upright image; of integers, ``to_grid``'s inverse."""
    x1, y1, x2, y2 = values
    return (
        x1 * size.width / grid,
        y1 * size.height / grid,
        x2 * size.width / grid,
        y2 * size.height / grid,
    )
