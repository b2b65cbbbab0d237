"""InternVL: tiles, their tokens and pixels, boxes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pictures

from tiny_rows import asked, encoder_of, lively, picture, row, turn
from vlmtune.batching.collate import pack
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import UsageError
from vlmtune.models.encode import IGNORED
from vlmtune.models.families import family_class
from vlmtune.models.internvl import GRID
from vlmtune.testing import tiny
from vlmtune.training.loss import label_logits
from vlmtune.tuning.parts import count_parts

OWN = ImagePolicy()
corners = st.integers(0, GRID)
sizes = st.builds(Size, st.integers(1, 8000), st.integers(1, 8000))
labels = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda label: "ref>" not in label
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("internvl", tmp_path_factory.mktemp("models") / "internvl", seed=3)


@pytest.fixture(scope="module")
def encoder(folder):
    return encoder_of(folder, OWN)


@pytest.fixture(scope="module")
def family(encoder):
    return encoder.family


@pytest.fixture(scope="module")
def model(folder):
    return lively(folder)


def drawn(size, seed=0):
    return Pictures.open(io.BytesIO(picture(size, seed=seed).data)).convert("RGB")


def raw(pieces):
    return "".join(piece.text for piece in pieces)


# Tiles


@given(sizes, st.integers(1, 24))
def test_tiles_are_counted_as_the_processor_counts_them(family, size, most):
    """Also of one tile, which the processor does not cut at all."""
    tiles = family.parts.image_processor.get_number_of_image_patches(
        size.height, size.width, {"max_patches": most, "crop_to_patches": True}
    )
    assert family.visual_tokens(size, ImagePolicy(max_tiles=most)) == 4 * tiles


@pytest.mark.parametrize("most", [1, 2, 5, 12])
@pytest.mark.parametrize("size", [(56, 56), (3, 5), (300, 31), (31, 300), (200, 140), (1, 9)])
def test_tokens_counted_from_the_size_are_those_of_the_pixels(family, most, size):
    policy = ImagePolicy(max_tiles=most)
    pixels = family.image_inputs([drawn(size)], policy)["pixel_values"]
    resized = family.resized(Size(*size), policy)
    tiles = (resized.width // 56) * (resized.height // 56)
    assert pixels.shape == (tiles + (tiles > 1), 3, 56, 56)
    assert family.visual_tokens(Size(*size), policy) == 4 * len(pixels)


def test_tiles_put_together_are_the_resized_picture(family):
    """In their places: a transposed grid of tiles would not be."""
    image = drawn((300, 120), seed=4)
    resized = family.resized(Size(300, 120), OWN)
    assert resized == Size(width=5 * 56, height=2 * 56)
    (seen,) = family.pictures(family.image_inputs([image], OWN), [Size(300, 120)], OWN)
    expected = np.asarray(image.resize(resized, Pictures.Resampling.BICUBIC), dtype=int)
    assert np.abs(seen.astype(int) - expected).max() <= 1


def test_the_number_of_tiles_is_the_only_choice(family):
    assert family.settle(OWN).max_tiles == 12
    settled = family.settle(ImagePolicy(max_tiles=3))
    assert family.settle(settled) == settled
    with pytest.raises(UsageError, match=r"image\.max_pixels.*it has image\.max_tiles"):
        family.settle(ImagePolicy(max_pixels=9000))


def test_a_row_holds_an_image_between_marks(encoder):
    """And a line end after it, which the template writes."""
    tokens = encoder.tokens(asked("What?", "x", picture((56, 56)), picture((112, 56))))
    tokenizer = encoder.family.parts.tokenizer
    text = tokenizer.decode(tokens.ids.tolist())
    context = "<IMG_CONTEXT>"
    assert f"user\n<img>{context * 4}</img>\n<img>{context * 12}</img>\nWhat?" in text


@torch.no_grad()
def test_a_tiles_neighbours_are_not_seen_by_the_tower(encoder, model):
    """Another first image changes the second's features not at all, and the logits very much."""

    def features(*images):
        vision = encoder.encode(asked("?", "x", *images)).vision
        return model.get_image_features(vision["pixel_values"], return_dict=True).pooler_output

    second = picture((112, 112), seed=2)
    one, other = (features(picture((56, 56), seed=seed), second) for seed in (1, 5))
    assert one.shape == (1 + 5, 4, 64)
    assert torch.equal(one[1:], other[1:])
    assert not torch.equal(one[0], other[0])
    batches = [
        pack(encoder.family, [encoder.encode(asked("?", "x", picture((56, 56), seed=s), second))])
        for s in (1, 5)
    ]
    logits = [label_logits(model, encoder.family, batch) for batch in batches]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


# Boxes


@given(corners, corners, corners, corners, labels, sizes)
def test_what_was_parsed_renders_to_the_same_text(family, x1, y1, x2, y2, label, size):
    name = f"<ref>{label}</ref>" if label else ""
    text = f"{name}<box>[[{x1}, {y1}, {x2}, {y2}]]</box>"
    (box,) = family.parse_boxes(text, [size], OWN)
    assert box.label == label
    assert raw(family.render_box(box, size, OWN)) == text


@pytest.mark.parametrize("size", [Size(1, 1), Size(997, 1003), Size(5304, 3540), Size(28, 8000)])
def test_every_integer_of_the_grid_survives(family, size):
    for value in range(GRID + 1):
        text = f"<box>[[{value}, {value}, {value}, {value}]]</box>"
        (box,) = family.parse_boxes(text, [size], OWN)
        assert raw(family.render_box(box, size, OWN)) == text


def test_several_boxes_may_share_a_label(family):
    boxes = "<box>[[1, 2, 3, 4], [5,6,7,8]]</box><box>[[0,0,9,9]]</box>"
    text = f"<ref>cat</ref> and <ref>dog</ref>{boxes}"
    found = family.parse_boxes(text, [Size(5, 5), Size(1000, 1000)], OWN)
    assert [(box.image, box.label, box.xyxy) for box in found] == [
        (1, "dog", (1, 2, 3, 4)),
        (1, "dog", (5, 6, 7, 8)),
        (1, "", (0, 0, 9, 9)),
    ]
    assert family.parse_boxes(text, [], OWN) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[[1, 2, 3, 4]]",
        "<box>[[1, 2, 3]]</box>",
        "<box>[1, 2, 3, 4]</box>",
        "<box>[[1, 2, 3, 4]]",
        "<box>[[-1, 2, 3, 4]]</box>",
        f"<box>[[{'9' * 5000}, 2, 3, 4]]</box>",
        f"<box>[{'[1, 2, 3, 4], ' * 5000}</box>",
    ],
)
def test_what_is_no_box_is_none(family, text):
    assert family.parse_boxes(text, [Size(10, 10)], OWN) == []


def test_a_box_is_trained_as_control_tokens_and_parsed_from_the_answer(encoder):
    tokenizer = encoder.family.parts.tokenizer
    box = Box(0, "狗 </box>", (9.0, 5.0, 45.0, 25.0))
    spoken = row(
        turn("user", 0, "?"), turn("assistant", "Here: ", box), images=(picture((90, 50)),)
    )
    tokens = encoder.tokens(spoken)
    assert tokens.ids.tolist().count(encoder.control_id("</box>")) == 1  # the label's own is text
    answer = tokenizer.decode(tokens.labels[tokens.labels != IGNORED].tolist())
    assert answer.startswith("Here: <ref>狗 </box></ref><box>[[100, 100, 500, 500]]</box>")
    assert encoder.family.parse_boxes(answer, [Size(90, 50)], OWN) == [box]


# Real sizes


def test_the_parts_of_a_real_model_are_whole():
    """InternVL3-1B: InternViT-300M, two layers of projector, Qwen2.5-0.5B; on no device."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": 151674,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
        vision_config={"attention_bias": True},
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    counts = count_parts(model, family_class("internvl").facts, trainable=False)
    assert counts == {"vision": 304_012_288, "projector": 4_482_816, "language": 629_697_920}
