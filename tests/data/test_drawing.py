"""Boxes and labels drawn on a picture; the original's layout is tested with its family."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageFont

from vlmtune.data import drawing
from vlmtune.data.conversation import Box
from vlmtune.data.drawing import draw_boxes, font_size, line_width
from vlmtune.data.labels import Rectangle, place_labels
from vlmtune.data.media import Size


@pytest.mark.parametrize(("side", "expected"), [(100, 15), (450, 15), (900, 30), (3000, 100)])
def test_letters_and_lines_grow_with_the_picture(side, expected):
    size = Size(side, side)
    assert font_size(size) == expected
    assert line_width(size) == expected / 4


rectangles = st.tuples(*[st.floats(-50, 300)] * 4).map(lambda xyxy: Box(0, "dog", xyxy))


@given(st.lists(rectangles, max_size=12), st.integers(1, 300), st.integers(1, 300))
def test_no_label_hides_another(found, width, height):
    shapes = drawing.arrange(Size(width, height), found, lambda text: 8.0 * len(text), 20.0)
    places = [shape.place for shape in shapes]
    assert len(places) == len(found)
    for number, place in enumerate(places):
        assert place.left >= 0
        assert place.right <= width + 0.01
        assert not any(place.touches(other) for other in places[:number])


def test_labels_at_one_corner_would_hide_each_other():
    """The control: put where they would like to stand, they overlap."""
    box, canvas = Rectangle(10, 10, 60, 60), Rectangle(0, 0, 100, 100)
    alone = place_labels([box], [40], 20, canvas, inside=True)[0]
    first, second = place_labels([box, box], [40, 40], 20, canvas, inside=True)
    assert first == alone == (10, 10, 50, 30)
    assert alone.touches(place_labels([box], [40], 20, canvas, inside=True)[0])
    assert not first.touches(second)


def test_room_is_added_where_a_picture_has_none():
    found = [Box(0, f"label {number}", (5, 5, 40, 20)) for number in range(6)]
    picture = draw_boxes(Image.new("RGB", (60, 30)), found)
    assert picture.width == 60
    assert picture.height > 30
    assert draw_boxes(Image.new("RGB", (60, 30)), found[:1]).size == (60, 30)


LATIN_ONLY = ("no such font.ttf",)


@pytest.mark.parametrize("label", ["击掌 🐎", "a\nb\t c", "x" * 500, "\x00", " ", "é", "狗" * 90])
def test_any_label_can_be_drawn_with_any_font(label, monkeypatch):
    """Also where no font has its characters, as on a machine with Latin fonts only."""
    monkeypatch.setattr(drawing, "WIDE_FONTS", LATIN_ONLY)
    drawing._wide_font.cache_clear()
    picture = Image.new("RGB", (120, 90), "white")
    boxes = [Box(0, label, (10, 10, 70, 70)), Box(0, "", (900, -900, -900, 1e9))]
    try:
        done = draw_boxes(picture, boxes)
    finally:
        drawing._wide_font.cache_clear()
    assert ImageChops.difference(done.crop((0, 0, 120, 90)), picture).getbbox() is not None


def test_a_font_can_be_given(tmp_path):
    import matplotlib

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSerif.ttf"
    picture, boxes = Image.new("RGB", (200, 90)), [Box(0, "dog", (10, 10, 70, 70))]
    assert draw_boxes(picture, boxes, font=path) != draw_boxes(picture, boxes)
    assert isinstance(drawing.load_font(20, "狗", path), ImageFont.FreeTypeFont)
    with pytest.raises(OSError, match="cannot open"):
        draw_boxes(picture, boxes, font=tmp_path / "missing.ttf")
