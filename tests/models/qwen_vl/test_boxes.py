"""Boxes as text, and as drawings."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from vlmtune.data import drawing
from vlmtune.data.boxes import from_grid
from vlmtune.data.conversation import Box, Text
from vlmtune.data.drawing import font_size, line_width
from vlmtune.data.media import Size
from vlmtune.models.qwen_vl.boxes import (
    GRID,
    answer_parts,
    draw_on_latest,
    parse_boxes,
    readable,
    render_box,
)

corners = st.tuples(*[st.integers(0, GRID - 1)] * 4)
sizes = st.builds(Size, st.integers(1, 8000), st.integers(1, 8000))
labels = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda label: "<" not in label
)
PLAIN = Size(GRID, GRID)  # a picture whose pixels are the grid


def raw(pieces):
    return "".join(piece.text for piece in pieces)


# Text


def test_boxes_and_phrases_are_the_originals(golden):
    for text, expected in golden["all_box_with_ref"].items():
        found = parse_boxes(text, [PLAIN])
        assert [list(map(int, box.xyxy)) for box in found] == [each["box"] for each in expected]
        assert [box.label.strip() for box in found] == [each.get("ref", "") for each in expected]


@given(corners, labels, sizes)
def test_what_was_parsed_renders_to_the_same_text(values, label, size):
    x1, y1, x2, y2 = values
    name = f"<ref>{label}</ref>" if label else ""
    text = f"{name}<box>({x1},{y1}),({x2},{y2})</box>"
    (box,) = parse_boxes(text, [size])
    assert box == Box(0, label, from_grid(values, size, GRID))
    assert raw(render_box(box, size)) == text
    assert answer_parts(text, [size]) == (box,)


def test_only_tags_are_control_tokens():
    pieces = render_box(Box(0, "<box>", (0, 0, 1, 1)), PLAIN)
    assert [piece.text for piece in pieces if piece.control] == [
        "<ref>",
        "</ref>",
        "<box>",
        "</box>",
    ]
    assert [piece.text for piece in pieces if not piece.control] == ["<box>", "(0,0),(1,1)"]


def test_boxes_lie_on_the_latest_picture():
    text = "<box>(0,0),(500,500)</box>"
    (box,) = parse_boxes(text, [Size(10, 10), Size(100, 200)])
    assert box == Box(1, "", (0.0, 0.0, 50.0, 100.0))
    assert parse_boxes(text, []) == []
    assert answer_parts(text, []) == (Text(text),)


def test_a_phrase_belongs_to_the_box_directly_behind_it():
    text = (
        "<ref>a</ref> is <box>(1,2),(3,4)</box>"
        "<ref>b</ref><box>(5,6),(7,8)</box><box>(0,0),(1,1)</box>"
    )
    assert [(box.label, box.xyxy) for box in parse_boxes(text, [PLAIN])] == [
        ("", (1, 2, 3, 4)),
        ("b", (5, 6, 7, 8)),
        ("", (0, 0, 1, 1)),
    ]


def test_a_quadrangle_is_the_box_around_it():
    text = "<ref>word</ref><quad>(10,40),(60,20),(70,50),(20,70)</quad>"
    assert parse_boxes(text, [PLAIN]) == [Box(0, "word", (10, 20, 70, 70))]
    assert answer_parts(text, [PLAIN])[-1] == Text("<quad>(10,40),(60,20),(70,50),(20,70)</quad>")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(1,2),(3,4)",
        "<box>(1,2),(3)</box>",  # the original fails on it with an empty message
        "<box>",
        "<box>(1,2),(3,4)",
        "<box>(-1,2),(3,4)</box>",
        "<box>(1,2),(3,4),(5,6)</box>",
        "<quad>(1,2),(3,4)</quad>",
        "<box><box>(1,2),(3,4)",
        f"<box>({'9' * 5000},2),(3,4)</box>",
        "<box>(一,2),(3,4)</box>",
    ],
)
def test_what_is_no_box_is_passed_over(text):
    assert parse_boxes(text, [PLAIN]) == []
    good = "<box>(1,2),(3,4)</box>"  # the control, and none is lost behind a bad one
    assert parse_boxes(f"{text}</box></quad> {good}", [PLAIN])[-1] == Box(0, "", (1, 2, 3, 4))


odd = ("(1,2)", ",", "3", "<box>", "</box>", "<ref>", "</ref>", "<quad>", "</quad>", "狗")


@given(st.lists(st.sampled_from(odd), max_size=20))
def test_no_text_is_too_odd(pieces):
    text = "".join(pieces)
    parts = answer_parts(text, [PLAIN])
    assert len(parse_boxes(text, [PLAIN])) >= sum(isinstance(part, Box) for part in parts)
    readable(text)


def test_parts_of_an_answer_spell_the_answer():
    text = "Left: <ref>dog</ref><box>(1,2),(3,4)</box>, and <ref>a</ref> <img>x</img><box>no</box>"
    parts = answer_parts(text, [PLAIN])
    assert [type(part) for part in parts].count(Box) == 1
    spelt = [raw(render_box(p, PLAIN)) if isinstance(p, Box) else p.text for p in parts]
    assert "".join(spelt) == text


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("The <ref>dog</ref><box>(1,2),(3,4)</box> runs", "The dog runs"),
        ("The <ref>do", "The do"),
        ("The <ref>dog</ref><box>(1,", "The dog"),
        ("1 < 2", "1 < 2"),
    ],
)
def test_people_read_no_tags(answer, read):
    assert readable(answer) == read


# Drawings


@pytest.fixture(scope="module")
def drawn(shared_data):
    path = shared_data / "qwen_vl_golden" / "tokenizer" / "golden_draw.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_drawing_is_laid_out_as_the_originals(drawn):
    size = Size(*drawn["image_size"])
    found = parse_boxes(drawn["response"], [size])
    shapes = drawing.arrange(size, found, lambda text: 8.0 * len(text), 20.0)
    for shape, expected in zip(shapes, drawn["rects"], strict=True):
        left, top, right, bottom = shape.corners
        assert [left, top] == expected["xy"]
        assert (right - left, bottom - top) == (expected["w"], expected["h"])
        assert line_width(size) == expected["linewidth"]
    # The original draws colours by chance: ours are from the same ten, and change with its.
    edges = [expected["edge"] for expected in drawn["rects"]]
    colours = [shape.colour for shape in shapes]
    assert set(edges) | set(colours) <= set(drawing.COLOURS)
    assert [each == colours[0] for each in colours] == [each == edges[0] for each in edges]

    labelled = [shape for shape in shapes if shape.place]
    assert font_size(size) == drawn["texts"][0]["size"]
    for shape, expected in zip(labelled, drawn["texts"], strict=True):
        assert shape.label == expected["text"]
        assert [shape.place.left, shape.place.top] == expected["xy"]
    for edge, text in ((edges[0], drawn["texts"][0]), (edges[2], drawn["texts"][1])):
        assert [value / 255 for value in drawing.lightened(edge)] == pytest.approx(text["color"])
    # The control: a box a pixel further is seen.
    moved = [Box(0, box.label, tuple(value + 1 for value in box.xyxy)) for box in found]
    other = drawing.arrange(size, moved, lambda text: 8.0 * len(text), 20.0)
    assert [shape.corners for shape in other] != [shape.corners for shape in shapes]


def test_an_answer_is_drawn_on_the_latest_picture(drawn):
    size = tuple(drawn["image_size"])
    pictures = [Image.new("RGB", (5, 5)), Image.new("L", size, 90)]
    picture = draw_on_latest(drawn["response"], pictures)
    assert picture.mode == "RGB"
    assert list(picture.size) == drawn["saved_png_size"]
    assert np.asarray(picture).shape == tuple(drawn["get_image_shape"])
    assert ImageChops.difference(picture, pictures[1].convert("RGB")).getbbox() is not None
    assert pictures[1].getextrema() == (90, 90)  # the picture itself is left alone
    assert draw_on_latest(drawn["response"], []) is drawn["no_image"]
    assert draw_on_latest("no box", pictures) is drawn["no_box"]
