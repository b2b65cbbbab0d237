from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from format_samples import read, rows_of
from vlmtune.data.boxes import from_grid, to_grid
from vlmtune.data.conversation import Box, Image, Message, Part, Text
from vlmtune.data.formats.draft import tidy
from vlmtune.data.formats.qwen_markup import GRID, parse, render
from vlmtune.data.media import Size
from vlmtune.data.sources import FieldError


def turn(*values: str, roles: str = "user assistant") -> dict[str, Any]:
    names = roles.split() * len(values)
    return {
        "conversations": [
            {"from": role, "value": value} for role, value in zip(names, values, strict=False)
        ]
    }


def test_pictures_and_boxes() -> None:
    text, grounded = read(rows_of("qwen-vl", "text, one image, several images"))
    assert text.images == ()
    assert grounded.id == "identity_1"
    assert grounded.images == ("https://x.org/demo.jpeg",)
    assert grounded.box_scale == 1000
    assert grounded.notes == ()
    assert grounded.messages == (
        Message("user", (Image(0), Text("图中的狗是什么品种？"))),
        Message("assistant", (Text("图中是一只拉布拉多犬。"),)),
        Message("user", (Text("框出图中的格子衬衫"),)),
        Message("assistant", (Box(0, "格子衬衫", (588, 499, 725, 789)),)),
    )


def test_several_pictures_in_several_turns() -> None:
    value = "Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\nCompare."
    row = turn(value, "<box>(1,2),(3,4)</box>", "Picture 3: <img>c.png</img>\n?", "x")
    (draft,) = read([row])
    assert draft.images == ("a.png", "b.png", "c.png")
    assert draft.messages[0].content == (Image(0), Image(1), Text("Compare."))
    assert draft.messages[1].content == (Box(1, "", (1, 2, 3, 4)),)
    assert draft.messages[2].content == (Image(2), Text("?"))
    assert draft.notes == ()


def test_a_turn_may_count_its_pictures_from_one_again() -> None:
    (draft,) = read([turn("Picture 1: <img>a</img>\n?", "x", "Picture 1: <img>b</img>\n?", "y")])
    assert draft.notes == ()
    (draft,) = read([turn("Picture 7: <img>a</img>\n?", "x")])
    assert draft.messages[0].content == (Image(0), Text("?"))
    assert draft.notes == ("conversations[0].value calls image 1 'Picture 7'",)


def test_the_evaluations_form_has_no_prefix() -> None:
    (draft,) = read([turn("<img>a.png</img>Describe the image in English:", "x")])
    assert draft.messages[0].content == (Image(0), Text("Describe the image in English:"))


def test_an_answer_before_the_first_question_is_left_out() -> None:
    row = turn("hello", "<img>a</img>?", "x", roles="assistant user")
    (draft,) = read([row])
    assert [message.role for message in draft.messages] == ["user", "assistant"]
    assert draft.notes == ("left out conversations[0].value: an answer before the first question",)


def test_what_stays_text_is_noted() -> None:
    quad = "<ref>a</ref><quad>(1,2),(3,4),(5,6),(7,8)</quad>"
    (draft,) = read([turn("<img>a</img>Find the <ref>dog</ref>", quad)])
    assert draft.messages[0].content == (Image(0), Text("Find the <ref>dog</ref>"))
    assert draft.messages[1].content == (Text(quad),)
    assert [re.sub(r".*has a <(\w+)>.*", r"\1", note) for note in draft.notes] == [
        "ref",
        "quad",
        "ref",
    ]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("<img>a.png", "bad_markup"),
        ("a.png</img>", "bad_markup"),
        ("<img>a<img>b</img>", "bad_markup"),
        ("<img>a</img><ref>x<box>(1,2),(3,4)</box></ref>", "bad_markup"),
        ("<img>a</img><box>(1,2),(3,4)", "bad_markup"),
        ("<img>a</img><box>(1,2),(3,4)</quad>", "bad_markup"),
        ("<img>a</img><box>(1,2)</box>", "bad_box"),
        ("<img>a</img><box>(1,2),(3,x)</box>", "bad_box"),
        ("<img>a</img><box></box>", "bad_box"),
        ("<box>(1,2),(3,4)</box>", "bad_box"),
        (" ", "empty_question"),
        (3, "missing_field"),
    ],
)
def test_faults_have_their_codes(value: Any, code: str) -> None:
    with pytest.raises(FieldError) as caught:
        read([turn(value, "x")], "qwen-vl")
    assert caught.value.code == code
    assert caught.value.field == "conversations[0].value"


@pytest.mark.parametrize("tag", ["<img>", "<box>", "</ref>", "<ref></ref>", "Picture 1: ", "\n("])
def test_long_texts_take_linear_time(tag: str) -> None:
    text = "<img>a</img>" + tag * 60_000
    started = time.perf_counter()
    with contextlib.suppress(FieldError):
        parse(text, [])
    assert time.perf_counter() - started < 2


def test_the_golden_strings_keep_their_integers(shared_data: Path) -> None:
    golden = json.loads((shared_data / "golden" / "expected_values.json").read_text())
    for item in golden["grounding"]["qwen_vl_strings"]["items"]:
        sizes = re.search(r"\((\d+)x(\d+)\)", item["image"])
        size = Size(int(sizes[1]), int(sizes[2])) if sizes else Size(2048, 1365)
        prompt = f"Picture 1: <img>{item['image']}</img>\n{item['prompt']}"
        images: list[str] = []
        asked, _ = parse(prompt, images)
        answered, _ = parse(item["output"], images)
        assert asked == (Image(0), Text(item["prompt"]))
        assert render(asked, images) == prompt
        assert render(through_pixels(answered, size), images) == item["output"]
        integers = [int(n) for n in re.findall(r"\d+", item["output"])]
        assert [n for part in answered if isinstance(part, Box) for n in part.xyxy] == integers
        if "clean" in item:
            texts = [part.text if isinstance(part, Text) else part.label for part in answered]
            assert "".join(dict.fromkeys(texts)).strip() == item["clean"]


def through_pixels(parts: tuple[Part, ...], size: Size) -> tuple[Part, ...]:
    """What export does: pixels to the grid again."""
    return tuple(
        Box(part.image, part.label, to_grid(from_grid(part.xyxy, size, GRID), size, GRID))
        if isinstance(part, Box)
        else part
        for part in parts
    )


def test_render_refuses_what_the_form_cannot_say() -> None:
    box = (1.0, 2.0, 3.0, 4.0)
    for parts in (
        (Image(0), Text("a <box> is")),
        (Image(0), Image(1), Box(0, "", box)),
        (Image(0), Box(0, "<ref>", box)),
        (Image(0), Text("\x00"), Box(0, "a</ref>", box)),
        (Text("a"), Text("b")),
    ):
        with pytest.raises(FieldError) as caught:
            render(parts, ["a", "b"])
        assert caught.value.code == "bad_markup"


WORDS = st.text(
    st.characters(exclude_characters="<>", exclude_categories=["Cs"]), min_size=1, max_size=8
)
PIECES = WORDS | st.sampled_from(["\n", "Picture 2: ", "Picture 1: ", "(1,2)", "<", ">", "<quad>"])
CORNER = st.integers(0, 999).map(float)


@st.composite
def turns(draw: st.DrawFn) -> tuple[tuple[Part, ...], list[str]]:
    parts: list[Part] = []
    paths: list[str] = []
    for kind in draw(st.lists(st.sampled_from(["text", "image", "box"]), max_size=7)):
        if kind == "image":
            paths.append(draw(WORDS))
            parts.append(Image(len(paths) - 1))
        elif kind == "text":
            parts.append(Text(draw(PIECES.filter(lambda text: "quad" not in text))))
        elif paths:
            label = draw(st.sampled_from(["", "", "a", "b"]) | WORDS)
            corners = draw(st.tuples(CORNER, CORNER, CORNER, CORNER))
            parts.append(Box(len(paths) - 1, label, corners))
    return tidy(parts), paths


@settings(max_examples=300, deadline=None)
@given(turns())
@example(((Image(0), Box(0, "a", (1, 2, 3, 4)), Box(0, "", (1, 2, 3, 4))), ["x"]))
@example(((Image(0), Text("\n"), Box(0, "", (1, 2, 3, 4))), ["x"]))
def test_parsing_is_the_inverse_of_rendering(
    given_turn: tuple[tuple[Part, ...], list[str]],
) -> None:
    parts, paths = given_turn
    found: list[str] = []
    text = render(parts, paths)
    assert parse(text, found)[0] == parts
    assert found == paths


TAGS = [f"<{slash}{name}>" for name in ("img", "ref", "box", "quad") for slash in ("", "/")]
MARKUP = st.lists(st.sampled_from([*TAGS, "(1,2),(3,4)", "Picture 1: ", "\n", "é"]), max_size=14)


@settings(max_examples=400, deadline=None)
@given(MARKUP.map("".join) | st.text(max_size=30))
@example("<img>a</img><ref>x</ref><box>(1,2),(3,4)</box><box>(1,2),(3,4)</box>")
@example("<img>a</img><ref>x</ref>")
def test_parse_never_crashes(text: str) -> None:
    images: list[str] = []
    code, parts = "", ()
    try:
        parts, _ = parse(text, images)
    except FieldError as fault:
        code = fault.code
    assert code in ("", "bad_markup", "bad_box")
    if code:
        return
    assert parts == tidy(parts)
    assert [part.index for part in parts if isinstance(part, Image)] == list(range(len(images)))
    again: list[str] = []
    assert parse(render(parts, images), again)[0] == parts
    assert again == images
