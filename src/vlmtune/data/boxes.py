"""Boxes between pixels and a model's integer grid.

Inside vlmtune a box is float64 pixels of the upright original image. A grid of ``n`` divides width
and height into ``n`` steps; the inverse of a grid value is exact enough that rendering what was
parsed gives back the same integers, for every integer of the grid.
"""

from __future__ import annotations

from vlmtune.data.media import Size

Corners = tuple[float, float, float, float]


def to_grid(
    xyxy: Corners, size: Size, grid: int | Size, *, closed: bool = False
) -> tuple[int, int, int, int]:
    """Pixels to integers in ``0 … grid - 1``.

    Args:
        xyxy: ``(x1, y1, x2, y2)`` in pixels of the upright image.
        size: The upright image's size in pixels.
        grid: Steps an axis, e.g. 1000; steps of each axis, e.g. the size the model sees.
        closed: Whether ``grid`` itself is a value, the far edge of the image.
    """
    columns, rows = grid if isinstance(grid, Size) else (grid, grid)
    scaled = (
        (xyxy[0] * columns / size.width, columns),
        (xyxy[1] * rows / size.height, rows),
        (xyxy[2] * columns / size.width, columns),
        (xyxy[3] * rows / size.height, rows),
    )
    x1, y1, x2, y2 = (
        min(max(round(value), 0), steps if closed else steps - 1) for value, steps in scaled
    )
    return x1, y1, x2, y2


def from_grid(values: Corners, size: Size, grid: float | Size) -> Corners:
    """Values of a grid to float pixels of the upright image; of integers, ``to_grid``'s inverse."""
    columns, rows = grid if isinstance(grid, Size) else (grid, grid)
    x1, y1, x2, y2 = values
    return (
        x1 * size.width / columns,
        y1 * size.height / rows,
        x2 * size.width / columns,
        y2 * size.height / rows,
    )
