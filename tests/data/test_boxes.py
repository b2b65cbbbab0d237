"""Boxes between pixels and a grid: exact one way round, half a step the other."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.data.boxes import from_grid, to_grid
from vlmtune.data.media import Size

sizes = st.builds(Size, st.integers(1, 20_000), st.integers(1, 20_000))
grids = st.integers(1, 2000)


@given(st.data(), sizes, grids)
def test_a_grid_box_comes_back(data, size, grid):
    values = tuple(data.draw(st.integers(0, grid - 1)) for _ in range(4))
    assert to_grid(from_grid(values, size, grid), size, grid) == values


@pytest.mark.parametrize("grid", [1000, 1001, 999])
@pytest.mark.parametrize("side", [1, 3, 28, 333, 1000, 1023, 5304, 19_999])
def test_every_integer_of_a_grid_comes_back(side, grid):
    size = Size(side, side + 1)
    for value in range(grid):
        values = (value,) * 4
        assert to_grid(from_grid(values, size, grid), size, grid) == values


@given(st.data(), sizes, st.one_of(grids, sizes))
def test_a_closed_grid_holds_its_far_edge(data, size, grid):
    """Of steps an axis too; the box that is the whole image comes back whole."""
    columns, rows = grid if isinstance(grid, Size) else (grid, grid)
    values = tuple(data.draw(st.integers(0, (columns, rows)[axis % 2])) for axis in range(4))
    assert to_grid(from_grid(values, size, grid), size, grid, closed=True) == values
    whole = (0.0, 0.0, float(size.width), float(size.height))
    assert to_grid(whole, size, grid, closed=True) == (0, 0, columns, rows)
    assert to_grid(whole, size, grid) == (0, 0, columns - 1, rows - 1)


@given(st.data(), sizes, grids)
def test_pixels_come_back_within_a_step(data, size, grid):
    """Half a step by rounding; a whole one at the far edge, which the grid does not hold."""
    xyxy = tuple(data.draw(st.floats(0, size[axis % 2])) for axis in range(4))
    back = from_grid(to_grid(xyxy, size, grid), size, grid)
    for axis in range(4):
        step = size[axis % 2] / grid
        at_edge = xyxy[axis] > (grid - 1) * step
        assert abs(back[axis] - xyxy[axis]) <= (1 if at_edge else 0.5) * step * (1 + 1e-9)


@given(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False, width=32)] * 4), sizes, grids)
def test_what_lies_outside_is_moved_to_the_edge(xyxy, size, grid):
    assert all(0 <= value < grid for value in to_grid(xyxy, size, grid))


@given(st.data(), sizes, grids)
def test_order_is_kept(data, size, grid):
    low, high = sorted(data.draw(st.floats(0, size.width)) for _ in range(2))
    x1, _, x2, _ = to_grid((low, 0.0, high, 0.0), size, grid)
    assert x1 <= x2


def test_width_and_height_are_not_confused():
    size = Size(width=2000, height=500)
    assert to_grid((200.0, 50.0, 1000.0, 400.0), size, 1000) == (100, 100, 500, 800)
    assert from_grid((100, 100, 500, 800), size, 1000) == (200.0, 50.0, 1000.0, 400.0)


def test_published_pairs(shared_data):
    """ms-swift documents the same boxes in pixels and per mille."""
    golden = json.loads((shared_data / "golden/expected_values.json").read_text("utf-8"))
    pairs = golden["grounding"]["ms_swift_conversion"]["pairs"]
    assert len(pairs) == 5
    for pair in pairs:
        size = Size(*pair["implied_image"])
        real, grid = (tuple(pair[name]) * (4 // len(pair[name])) for name in ("real", "norm1000"))
        assert to_grid(real, size, 1000) == grid
        assert from_grid(grid, size, 1000) == pytest.approx(real, abs=1e-9)
