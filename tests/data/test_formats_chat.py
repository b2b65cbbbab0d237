from __future__ import annotations

from typing import Any

import pytest

from format_samples import ANSWER, read, rows_of
from vlmtune.data.conversation import Box, Image, Message, Text
from vlmtune.data.sources import FieldError

ASK = {"role": "user", "content": "<image>What?"}


def fault_of(row: dict[str, Any], name: str) -> tuple[str, str]:
    with pytest.raises(FieldError) as caught:
        read([row], name)
    return caught.value.code, caught.value.field


def test_llava_takes_the_formats_line_breaks_away() -> None:
    shown, text = read(rows_of("llava", "an image, and text only"))
    assert shown.messages[0].content == (Image(0), Text("What are the colors of the bus?"))
    assert shown.images == ("coco/train2017/000000033471.jpg",)
    assert shown.field == "image"
    assert text.images == ()
    (several,) = read(rows_of("llava", "several images"))
    assert several.messages[0].content == (Image(0), Image(1), Text("Which?"))
    row = {"image": "a", "conversations": [{"from": "human", "value": "a\n\n<image>\n\nb"}]}
    assert read([row])[0].messages[0].content == (Text("a\n"), Image(0), Text("\nb"))


def test_sharegpt_keeps_texts_as_they_are() -> None:
    row = {"messages": [{"role": "user", "content": "a\n<image>\nb"}, ANSWER], "images": ["1"]}
    (draft,) = read([row])
    assert draft.messages[0].content == (Text("a\n"), Image(0), Text("\nb"))
    (draft,) = read(rows_of("sharegpt", "conversations from human and gpt"))
    assert [message.role for message in draft.messages] == ["system", "user", "assistant"]
    assert draft.messages[0].text == "Be brief."
    # An answer may speak of the mark.
    row = {"messages": [ASK, {"role": "assistant", "content": "<image>"}], "images": "1.png"}
    assert read([row])[0].messages[1].content == (Text("<image>"),)


@pytest.mark.parametrize(
    ("name", "row", "fault"),
    [
        (
            "llava",
            {"image": "a", "conversations": [{"from": "human", "value": "no mark"}]},
            ("image_mismatch", "image"),
        ),
        (
            "llava",
            {"conversations": [{"from": "human", "value": "<image>?"}]},
            ("image_mismatch", "conversations[0].value"),
        ),
        (
            "sharegpt",
            {"messages": [ASK, ANSWER], "images": ["a", "b"]},
            ("image_mismatch", "images"),
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "observation", "value": "x"}]},
            ("bad_role", "conversations[0].from"),
        ),
        (
            "sharegpt",
            {"messages": [{"role": "function_call", "content": "x"}]},
            ("bad_role", "messages[0].role"),
        ),
        (
            "sharegpt",
            {"system": "a", "messages": [{"role": "system", "content": "b"}]},
            ("role_order", "system"),
        ),
        ("sharegpt", {"messages": [ASK, ANSWER], "videos": ["v"]}, ("media_unsupported", "videos")),
        (
            "sharegpt",
            {"messages": [{**ANSWER, "loss": False}]},
            ("loss_masked", "messages[0].loss"),
        ),
        ("openai", {"messages": [{**ANSWER, "weight": 0}]}, ("loss_masked", "messages[0].weight")),
        ("openai", {"messages": "x"}, ("bad_row", "messages")),
        ("openai", {"messages": ["x"]}, ("missing_field", "messages[0]")),
        (
            "openai",
            {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
            ("missing_field", "messages[0].content"),
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            ("bad_part", "messages[0].content[0]"),
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": []}]},
            ("empty_question", "messages[0].content"),
        ),
        (
            "trl",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
            ("image_mismatch", "messages[0].content[0]"),
        ),
        ("trl", {"prompt": "a"}, ("missing_field", "completion")),
        ("trl", {"prompt": 3, "completion": "b"}, ("missing_field", "prompt")),
        ("ms-swift", {"query": "<image>", "response": "x"}, ("image_mismatch", "query")),
        (
            "ms-swift",
            {"query": "q", "response": "x", "history": [["a"]]},
            ("bad_row", "history[0]"),
        ),
        ("ms-swift", {"query": "q", "response": None}, ("missing_field", "response")),
    ],
)
def test_faults_have_their_codes_and_fields(
    name: str, row: dict[str, Any], fault: tuple[str, str]
) -> None:
    assert fault_of(row, name) == fault


def test_openai_parts() -> None:
    (draft,) = read(rows_of("openai", "parts with data and other URLs"))
    assert draft.messages[1].content == (Text("What is this?"), Image(0), Image(1))
    assert draft.images == ("data:image/png;base64,AAAA", "https://x.org/a.jpg")
    assert draft.field == "messages"
    part = {"type": "image_url", "image_url": "a.png"}
    (draft,) = read(
        [{"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": [part]}]}]
    )
    assert draft.messages[0].role == "system"
    assert draft.images == ("a.png",)


def test_trl_puts_images_without_a_part_before_the_first_question() -> None:
    (draft,) = read(rows_of("trl", "messages with parts"))
    assert draft.messages[0].content == (Image(0), Text("What colour?"))
    assert draft.messages[1].content == (Text("Blue."),)
    assert draft.images == ({"bytes": b"x", "path": None},)
    (draft,) = read(rows_of("trl", "messages with texts"))
    assert draft.messages[0].content == (Image(0), Text("Who are you?"))
    (draft,) = read(rows_of("trl", "prompt and completion"))
    assert draft.messages == (
        Message("user", (Text("The sky is"),)),
        Message("assistant", (Text(" blue."),)),
    )
    (draft,) = read(rows_of("trl", "prompt and completion as turns"))
    assert draft.messages[0].content == (Image(0), Text("Who are you?"))
    inline = [{"type": "image", "image": b"x"}, {"type": "text", "text": "?"}]
    (draft,) = read([{"messages": [{"role": "user", "content": inline}, ANSWER]}])
    assert draft.images == (b"x",)


def test_swift_pairs_and_tags() -> None:
    (draft,) = read(rows_of("ms-swift", "query and response"))
    assert [message.role for message in draft.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert draft.messages[1].content == (Image(0), Text("What?"))
    assert draft.images == ("1.png",)
    # Images without a placeholder come first, however others are placed.
    row = {"query": "a<image>b", "response": "x", "images": ["1", "2"]}
    assert read([row])[0].messages[0].content == (Image(0), Text("a"), Image(1), Text("b"))
    row = {"query": "<img>0</img><image>", "response": "x", "images": ["1"]}
    assert read([row])[0].images == ("0", "1")


def swift(answer: str, ask: str = "<image>Find.", **objects: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}],
        "images": ["a.png"] * ask.count("<image>"),
        "objects": objects,
    }


def test_swift_phrases_and_boxes() -> None:
    (draft,) = read(rows_of("ms-swift", "boxes"))
    assert draft.box_scale is None
    assert draft.messages[1].content == (
        Box(0, "a dog", (331.5, 761.4, 853.5, 1594.8)),
        Text(" and "),
        Box(0, "a woman", (676.5, 685.8, 1099.5, 1427.4)),
        Text(" play on the beach"),
    )
    row = swift(
        "<bbox><bbox> but <ref-object><bbox><bbox>",
        "<image>Find the <ref-object> in <image>",
        ref=["sheep", "cow"],
        bbox=[[0, 0, 0.5, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0.25, 0, 1, 1]],
        bbox_type="norm1",
        image_id=[0, 1, 1, 0],
    )
    (draft,) = read([row])
    assert draft.box_scale == 1.0
    assert draft.messages[0].content == (Image(0), Text("Find the sheep in "), Image(1))
    boxes = [part for part in draft.messages[1].content if isinstance(part, Box)]
    assert [(box.image, box.label) for box in boxes] == [(0, ""), (1, ""), (1, "cow"), (0, "cow")]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (swift("<bbox>", bbox=[[1, 2, 3]]), ("bad_box", "objects.bbox[0]")),
        (swift("<bbox>", bbox=[[615, 226]]), ("bad_box", "objects.bbox[0]")),
        (swift("<bbox>", bbox=[[1, 2, 3, "x"]]), ("bad_box", "objects.bbox[0]")),
        (swift("<bbox>", bbox=[[1, 2, 3, float("nan")]]), ("bad_box", "objects.bbox[0]")),
        (swift("<bbox>", bbox=[[0] * 4], bbox_type="norm9"), ("bad_box", "objects.bbox_type")),
        (swift("<bbox>", bbox=[[0] * 4], image_id=["x"]), ("bad_box", "objects.image_id")),
        (swift("<bbox>", bbox=[]), ("box_mismatch", "objects.bbox")),
        (swift("none", bbox=[[0] * 4]), ("box_mismatch", "objects.bbox")),
        (swift("<ref-object>"), ("box_mismatch", "objects.ref")),
        (swift("x", ref=["a"]), ("box_mismatch", "objects.ref")),
        (swift("<bbox>", bbox=[[0] * 4], image_id=[0, 1]), ("box_mismatch", "objects.image_id")),
        ({**swift("x"), "objects": [1]}, ("bad_row", "objects")),
    ],
)
def test_faults_of_swift_objects(row: dict[str, Any], fault: tuple[str, str]) -> None:
    assert fault_of(row, "ms-swift") == fault
