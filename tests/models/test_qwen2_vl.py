"""The family itself: sizes, pixels, boxes."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pictures

from tiny_rows import SMALL, asked, encoder_of, picture, row, turn
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ModelError
from vlmtune.models.family import Join
from vlmtune.models.qwen2_vl import GRID

corners = st.integers(0, GRID - 1)
sizes = st.builds(Size, st.integers(1, 8000), st.integers(1, 8000))
labels = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda label: "<|" not in label
)


def raw(pieces):
    return "".join(piece.text for piece in pieces)


@pytest.fixture(scope="module")
def family(encoder):
    return encoder.family


# Sizes and pixels


@pytest.mark.parametrize(
    "policy",
    [
        SMALL,
        ImagePolicy(),
        ImagePolicy(max_pixels=56448),
        ImagePolicy(size=(60, 100)),
        ImagePolicy(size=(1, 1)),
    ],
)
@pytest.mark.parametrize("size", [(64, 48), (28, 28), (3, 5), (300, 31), (200, 1)])
def test_tokens_counted_from_the_size_are_those_of_the_pixels(family, policy, size):
    vision = family.image_inputs([Pictures.new("RGB", size)], policy)
    ((frames, rows, columns),) = vision["image_grid_thw"].tolist()
    resized = family.resized(Size(*size), policy)
    assert (frames, rows * 14, columns * 14) == (1, resized.height, resized.width)
    assert family.visual_tokens(Size(*size), policy) == rows * columns // 4
    assert vision["pixel_values"].shape == (rows * columns, 3 * 2 * 14 * 14)


@given(sizes.filter(lambda size: max(size) <= 200 * min(size)), st.integers(784, 10**6))
def test_resized_pictures_stay_within_the_area(family, size, most):
    resized = family.resized(size, ImagePolicy(min_pixels=784, max_pixels=most))
    assert resized.width % 28 == resized.height % 28 == 0
    # A very long picture is at least one token high; the reference does the same.
    assert resized.width * resized.height <= most or min(resized) == 28


def test_a_fixed_size_is_rounded_to_whole_tokens_once(family):
    policy = ImagePolicy(size=(60, 100))
    settled = family.settle(policy)
    assert settled.size == (56, 112)
    assert family.settle(settled) == settled
    assert family.resized(Size(3, 900), policy) == Size(width=112, height=56)
    exact = Pictures.open(io.BytesIO(picture((112, 56), seed=2).data)).convert("RGB")
    aspect = family.image_inputs([exact], ImagePolicy(min_pixels=6272, max_pixels=6272))
    fixed = family.image_inputs([exact], policy)
    assert torch.equal(fixed["pixel_values"], aspect["pixel_values"])


def test_limits_left_open_are_the_models_own(family):
    settled = family.settle(ImagePolicy())
    assert (settled.min_pixels, settled.max_pixels) == (3136, 1003520)
    assert family.settle(settled) == settled
    assert family.settle(ImagePolicy(max_pixels=1000)).min_pixels == 1000
    assert family.settle(ImagePolicy(min_pixels=2_000_000)).max_pixels == 2_000_000


def test_a_lacking_control_token_is_named(family):
    with pytest.raises(ModelError, match="<box>"):
        family.token_id("<box>")


def test_joins(family, encoder):
    """Patches and grids follow each other; a stacked tensor is padded to the largest."""
    rows = [encoder.encode(asked("?", "x", *images)) for images in ([], [picture()] * 2)]
    joined = family.join_vision([row.vision for row in rows])
    assert torch.equal(joined["image_grid_thw"], rows[1].vision["image_grid_thw"])
    assert family.join_vision([rows[0].vision]) == {}

    class Padding(type(family)):
        @property
        def facts(self):
            return replace(type(family).facts, joins={"pixels": Join.PAD})

    padded = Padding(family.parts).join("pixels", [torch.ones(2, 3), torch.ones(1, 4)])
    assert padded.tolist() == [[1, 1, 1, 0]] * 2 + [[1, 1, 1, 1]]


# Boxes


@given(corners, corners, corners, corners, labels, sizes)
def test_what_was_parsed_renders_to_the_same_text(family, x1, y1, x2, y2, label, size):
    name = f"<|object_ref_start|>{label}<|object_ref_end|>" if label else ""
    text = f"{name}<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
    (box,) = family.parse_boxes(text, [size], SMALL)
    assert box.label == label
    assert raw(family.render_box(box, size, SMALL)) == text


@pytest.mark.parametrize("size", [Size(1, 1), Size(997, 1003), Size(5304, 3540), Size(28, 8000)])
def test_every_integer_of_the_grid_survives(family, size):
    for value in range(GRID):
        text = f"<|box_start|>({value},{value}),({value},{value})<|box_end|>"
        (box,) = family.parse_boxes(text, [size], SMALL)
        assert raw(family.render_box(box, size, SMALL)) == text


@given(st.data(), sizes.filter(lambda size: max(size) <= 200 * min(size)))
def test_a_rendered_box_is_a_pixel_off_at_most(family, data, size):
    """In pixels of the picture as the model sees it, while its sides are not above the grid."""
    policy = ImagePolicy(min_pixels=3136, max_pixels=1000 * 1000)
    resized = family.resized(size, policy)
    if max(resized) > GRID:
        return
    corner = [
        (data.draw(st.floats(0, size.width)), data.draw(st.floats(0, size.height)))
        for _ in range(2)
    ]
    xyxy = (*corner[0], *corner[1])
    text = raw(family.render_box(Box(0, "", xyxy), size, SMALL))
    (parsed,) = family.parse_boxes(text, [size], SMALL)
    for axis in range(4):
        scale = resized[axis % 2] / size[axis % 2]
        assert abs(parsed.xyxy[axis] - xyxy[axis]) * scale <= 1.0 + 1e-9


def test_boxes_lie_on_the_latest_picture(family):
    text = "<|box_start|>(0,0),(500,500)<|box_end|>"
    (box,) = family.parse_boxes(text, [Size(10, 10), Size(100, 200)], SMALL)
    assert box == Box(1, "", (0.0, 0.0, 50.0, 100.0))
    assert family.parse_boxes(text, [], SMALL) == []


def test_a_name_without_a_box_is_not_its_neighbours(family):
    def named(label):
        return f"<|object_ref_start|>{label}<|object_ref_end|>"

    box = "<|box_start|>(1,2),(3,4)<|box_end|>"
    found = family.parse_boxes(
        f"{named('cat')} and {named('dog')}{box}{box}", [Size(1000, 1000)], SMALL
    )
    assert [(b.label, b.xyxy) for b in found] == [("dog", (1, 2, 3, 4)), ("", (1, 2, 3, 4))]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(1,2),(3,4)",
        "<|box_start|>(1,2),(3)<|box_end|>",
        "<|box_start|>(1,2),(3,4)",
        "<|box_start|>(-1,2),(3,4)<|box_end|>",
        f"<|box_start|>({'9' * 5000},2),(3,4)<|box_end|>",
    ],
)
def test_what_is_no_box_is_none(family, text):
    assert family.parse_boxes(text, [Size(10, 10)], SMALL) == []


def test_a_box_is_trained_as_control_tokens_and_parsed_from_the_answer(folder):
    encoder = encoder_of(folder)
    tokenizer = encoder.family.parts.tokenizer
    image = picture((90, 50))
    box = Box(0, "狗 <|box_end|>", (9.0, 5.0, 45.0, 25.0))
    spoken = row(turn("user", 0, "?"), turn("assistant", "Here: ", box), images=(image,))
    tokens = encoder.tokens(spoken)
    ids = tokens.ids.tolist()
    assert ids.count(encoder.control_id("<|box_end|>")) == 1  # the label's own is text
    answer = tokenizer.decode(tokens.labels[tokens.labels != -100].tolist())
    assert answer.startswith("Here: <|object_ref_start|>狗 <|box_end|><|object_ref_end|>")
    assert encoder.family.parse_boxes(answer, [Size(90, 50)], SMALL) == [box]


# Exported settings


@pytest.mark.parametrize("policy", [ImagePolicy(max_pixels=56448), ImagePolicy(size=(56, 112))])
def test_exported_settings_hold_the_trained_limits(family, policy):
    from transformers import Qwen2VLImageProcessorPil

    settings = family.image_processor_config(policy)
    processor = Qwen2VLImageProcessorPil(
        **{name: value for name, value in settings.items() if name != "image_processor_type"}
    )
    image = Pictures.new("RGB", (224, 112), "red")
    theirs = processor(images=[image], return_tensors="pt")
    ours = family.image_inputs([image], policy)
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
