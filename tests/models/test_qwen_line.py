"""Qwen2.5-VL and Qwen3-VL: what they do not share with Qwen2-VL, and that they share the rest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pictures

from tiny_rows import asked, changed, encoder_of, lively, mixed_rows, picture, row, turn
from vlmtune.batching.collate import pack
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ModelError
from vlmtune.models.encode import IGNORED, Encoder
from vlmtune.models.families import family_class, load_family
from vlmtune.testing import TinySize, tiny
from vlmtune.training.loss import label_logits
from vlmtune.tuning.parts import count_parts

POLICY = ImagePolicy(min_pixels=784, max_pixels=16384)
CLOSE = {"rtol": 1e-5, "atol": 1e-4}
sizes = st.builds(Size, st.integers(1, 8000), st.integers(1, 8000)).filter(
    lambda size: max(size) <= 200 * min(size)
)
labels = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@dataclass(frozen=True)
class Tiny:
    """A tiny model of the line with three layers, so that DeepStack has two levels."""

    name: str
    folder: Any
    encoder: Encoder
    model: Any

    @property
    def family(self):
        return self.encoder.family


def made(name, place):
    size = TinySize(layers=3, vision_layers=3)
    folder = tiny(name, place / name, seed=3, size=size)
    return Tiny(name, folder, encoder_of(folder, POLICY), lively(folder))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("line")


@pytest.fixture(scope="module")
def qwen25(place):
    return made("qwen2_5_vl", place)


@pytest.fixture(scope="module")
def qwen3(place):
    return made("qwen3_vl", place)


@pytest.fixture(scope="module", params=["qwen25", "qwen3"])
def line(request):
    return request.getfixturevalue(request.param)


# Sizes


@given(sizes, st.integers(1024, 10**6))
def test_tokens_are_counted_as_the_processor_counts_patches(line, size, most):
    policy = ImagePolicy(min_pixels=784, max_pixels=most)
    limits = {"min_pixels": 784, "max_pixels": most}
    patches = line.family.parts.image_processor.get_number_of_image_patches(
        size.height, size.width, limits
    )
    assert line.family.visual_tokens(size, policy) == patches // 4


@pytest.mark.parametrize("policy", [POLICY, ImagePolicy(), ImagePolicy(size=(60, 100))])
@pytest.mark.parametrize("size", [(64, 48), (3, 5), (300, 31), (200, 1)])
def test_tokens_counted_from_the_size_are_those_of_the_pixels(line, policy, size):
    side = {"qwen2_5_vl": 14, "qwen3_vl": 16}[line.name]
    vision = line.family.image_inputs([Pictures.new("RGB", size)], policy)
    ((frames, rows, columns),) = vision["image_grid_thw"].tolist()
    resized = line.family.resized(Size(*size), policy)
    assert (frames, rows * side, columns * side) == (1, resized.height, resized.width)
    assert line.family.visual_tokens(Size(*size), policy) == rows * columns // 4
    assert vision["pixel_values"].shape == (rows * columns, 3 * 2 * side * side)


def test_an_image_processor_by_its_former_name(qwen25, tmp_path):
    """Old folders name a class that transformers has no more."""
    settings = json.loads((qwen25.folder / "preprocessor_config.json").read_text("utf-8"))

    def named(name):
        text = json.dumps({**settings, "image_processor_type": name})
        return changed(qwen25.folder, tmp_path / name, preprocessor_config_json=text)

    old = load_family(str(named("Qwen2_5_VLImageProcessor")))
    assert old.parts.vision == qwen25.family.parts.vision
    with pytest.raises(ModelError, match="names the image processor 'OtherImageProcessor'"):
        load_family(str(named("OtherImageProcessor")))


# Positions


def reference_positions(model, encoded):
    """``get_rope_index`` of stock transformers, given one row alone: (3, tokens)."""
    if not encoded.vision:
        return torch.arange(len(encoded.tokens)).expand(3, -1)
    positions, _ = model.model.get_rope_index(
        torch.from_numpy(encoded.tokens.ids)[None],
        torch.from_numpy(encoded.tokens.image_mask).int()[None],
        image_grid_thw=encoded.vision["image_grid_thw"],
    )
    return positions[:, 0]


def test_positions_are_the_models_own(line):
    """Of a video Qwen2.5-VL stretches the time; a still image has none to stretch."""
    rows = [line.encoder.encode(each) for each in mixed_rows(40, seed=12)]
    assert any(len(each.vision.get("image_grid_thw", ())) > 1 for each in rows)
    for each in rows:
        assert torch.equal(each.positions[0], torch.arange(len(each.tokens)))
        assert torch.equal(each.positions[1:], reference_positions(line.model, each))


# Packs


@pytest.fixture(scope="module")
def rows(line):
    """Rows of no, one and several images."""
    chosen = [asked("Hello there", "A text alone."), *mixed_rows(5, seed=11)]
    encoded = [line.encoder.encode(each) for each in chosen]
    assert len({len(each.vision.get("image_grid_thw", ())) for each in encoded}) > 2
    return encoded


def stock_logits(line, encoded):
    """The stock model's at the labels of a row alone; positions and mask are its own."""
    inputs = {"input_ids": torch.from_numpy(encoded.tokens.ids)[None], **encoded.vision}
    if encoded.vision:
        inputs["mm_token_type_ids"] = torch.from_numpy(encoded.tokens.image_mask).int()[None]
    trained = torch.from_numpy(encoded.tokens.labels[1:] != IGNORED)
    return line.model(**inputs, use_cache=False).logits[0, :-1][trained]


@torch.no_grad()
def test_a_pack_gives_the_stock_models_logits_of_each_row(line, rows):
    packed = label_logits(line.model, line.family, pack(line.family, rows))
    torch.testing.assert_close(
        packed, torch.cat([stock_logits(line, each) for each in rows]), **CLOSE
    )


@torch.no_grad()
def test_three_rows_of_positions_mix_the_neighbours(line, rows):
    """The control: without the row that counts tokens, the same pack is contaminated, silently."""
    batch = pack(line.family, rows)
    inputs = line.family.forward_inputs(batch.inputs)
    assert inputs["position_ids"].shape == (4, 1, batch.tokens)
    inputs["position_ids"] = inputs["position_ids"][1:]
    mixed = line.model(**inputs, logits_to_keep=batch.predicts).logits
    assert (mixed - label_logits(line.model, line.family, batch)).abs().max() > 1e-2


@torch.no_grad()
def test_windows_end_within_these_images(qwen25):
    """Else the tests above would not see a window that reaches into a neighbour's image."""
    batch = pack(qwen25.family, [qwen25.encoder.encode(asked("?", "x", picture((140, 90))))])
    tower, own = qwen25.model.model.visual, qwen25.model.model.visual.window_size
    seen = label_logits(qwen25.model, qwen25.family, batch)
    tower.window_size = 100 * own
    try:
        whole = label_logits(qwen25.model, qwen25.family, batch)
    finally:
        tower.window_size = own
    assert (seen - whole).abs().max() > 1e-2


# DeepStack


@pytest.fixture(scope="module")
def seen(qwen3):
    """A pack of three images in two rows, and what the tower makes of them."""
    first = asked("Which?", "Red.", picture((100, 60), seed=1), picture((64, 64), seed=2))
    second = asked("Which?", "Blue.", picture((64, 64), seed=3))
    batch = pack(qwen3.family, [qwen3.encoder.encode(each) for each in (first, second)])
    with torch.no_grad():
        features = qwen3.model.get_image_features(
            batch.inputs["pixel_values"], batch.inputs["image_grid_thw"], return_dict=True
        )
    return batch, features


@torch.no_grad()
def of_features(qwen3, batch, features):
    """Logits of a pack whose images were seen before."""
    inputs = qwen3.family.forward_inputs(batch.inputs)
    del inputs["pixel_values"]
    return qwen3.model(
        **inputs, mm_encoder_outputs={"image": features}, logits_to_keep=batch.predicts
    ).logits


def with_levels(features, levels):
    return type(features)(pooler_output=features.pooler_output, deepstack_features=levels)


def test_features_seen_before_give_the_same_logits(qwen3, seen):
    """What a cache must hold: the merged features and, level by level, those of DeepStack."""
    batch, features = seen
    assert [len(level) for level in features.deepstack_features] == [3, 3]
    with torch.no_grad():
        expected = label_logits(qwen3.model, qwen3.family, batch)
    # Rows by a mask here, by their bounds there: equal but for the order of sums.
    torch.testing.assert_close(of_features(qwen3, batch, features), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fault", ["lost", "levels swapped", "images swapped", "one changed"])
def test_wrong_levels_of_deepstack_are_seen(qwen3, seen, fault):
    """The controls: whatever goes wrong with the levels changes the logits."""
    batch, features = seen
    levels = [list(level) for level in features.deepstack_features]
    if fault == "lost":
        levels = []
    elif fault == "levels swapped":
        levels = levels[::-1]
    elif fault == "images swapped":  # the second of one row with the one of the other
        levels = [[level[0], level[2], level[1]] for level in levels]
    else:
        levels[1][2] = levels[1][2] + torch.eye(*levels[1][2].shape)
    wrong = of_features(qwen3, batch, with_levels(features, levels))
    right = of_features(qwen3, batch, features)
    assert (wrong - right).abs().max() > 1e-3
    if fault == "one changed":  # of the last image: the row before it keeps its bits
        first = int(batch.predicts[0, : batch.lengths[0]].sum())
        assert torch.equal(wrong[:first], right[:first])


# Boxes


def raw(pieces):
    assert not any(piece.control for piece in pieces)
    return "".join(piece.text for piece in pieces)


def written(*corners, label=""):
    name = f', "label": {json.dumps(label, ensure_ascii=False)}' if label else ""
    return f'{{"bbox_2d": {list(corners)}{name}}}'


def highest(line, size, policy):
    """The largest integer of x and of y."""
    if line.name == "qwen3_vl":
        return Size(1000, 1000)
    resized = line.family.resized(size, policy)
    return Size(resized.width - 1, resized.height - 1)


@pytest.mark.parametrize("size", [Size(1, 1), Size(997, 1003), Size(5304, 3540), Size(28, 4000)])
@pytest.mark.parametrize("policy", [ImagePolicy(), POLICY])
def test_every_integer_of_the_grid_survives(line, size, policy):
    most = highest(line, size, policy)
    for value in range(max(most) + 1):
        x, y = min(value, most.width), min(value, most.height)
        text = written(x, y, x, y)
        (box,) = line.family.parse_boxes(text, [size], policy)
        assert raw(line.family.render_box(box, size, policy)) == text


@given(st.data(), labels, sizes)
def test_what_was_parsed_renders_to_the_same_text(line, data, label, size):
    most = highest(line, size, POLICY)
    corners = [data.draw(st.integers(0, most[axis % 2])) for axis in range(4)]
    text = written(*corners, label=label)
    (box,) = line.family.parse_boxes(f"```json\n[\n\t{text}\n]\n```", [size], POLICY)
    assert box.label == label
    assert raw(line.family.render_box(box, size, POLICY)) == text


def test_boxes_are_pixels_of_what_qwen25_sees(qwen25):
    """The same box under another limit is another text: it belongs to the contract."""
    size, box = Size(200, 100), Box(0, "dog", (100.0, 50.0, 200.0, 100.0))
    small, large = ImagePolicy(size=(56, 112)), ImagePolicy(size=(112, 224))
    texts = [raw(qwen25.family.render_box(box, size, policy)) for policy in (small, large)]
    assert texts[0] == '{"bbox_2d": [56, 28, 111, 55], "label": "dog"}'
    assert texts[1] == '{"bbox_2d": [112, 56, 223, 111], "label": "dog"}'
    (found,) = qwen25.family.parse_boxes('{"bbox_2d": [56, 28, 112, 56]}', [size], small)
    assert found.xyxy == box.xyxy  # the far edge, should a model write it


def test_boxes_of_qwen3_are_thousandths_whatever_it_sees(qwen3):
    size, box = Size(200, 100), Box(0, "dog", (100.0, 50.0, 200.0, 100.0))
    for policy in (ImagePolicy(size=(64, 128)), ImagePolicy()):
        text = raw(qwen3.family.render_box(box, size, policy))
        assert text == '{"bbox_2d": [500, 500, 1000, 1000], "label": "dog"}'
        assert qwen3.family.parse_boxes(text, [size], policy) == [box]


def test_labels_may_hold_braces_and_quotes(line):
    label = r'\frac{a}{b} "x" }'
    text = f"[{written(1, 2, 3, 4, label=label)}, {written(5, 6, 7, 8)}]"
    found = line.family.parse_boxes(text, [Size(640, 480)], POLICY)
    assert [box.label for box in found] == [label, ""]
    broken = '{"bbox_2d": [1, 2, 3, 4], "label": "dog}, {"bbox_2d": [5, 6, 7, 8]}'
    assert len(line.family.parse_boxes(broken, [Size(640, 480)], POLICY)) == 2


def test_boxes_lie_on_the_latest_picture(line):
    text = written(0, 0, 0, 0)
    (box,) = line.family.parse_boxes(text, [Size(10, 10), Size(100, 200)], POLICY)
    assert box.image == 1
    assert line.family.parse_boxes(text, [], POLICY) == []


def test_a_box_is_trained_as_text_and_parsed_from_the_answer(line):
    box = Box(0, '狗 "Rex" <|im_end|>', (0.0, 0.0, 45.0, 25.0))
    spoken = row(
        turn("user", 0, "?"), turn("assistant", "Here: ", box), images=(picture((90, 50)),)
    )
    tokens = line.encoder.tokens(spoken)
    ids = tokens.labels[tokens.labels != IGNORED].tolist()
    assert ids.count(line.encoder.end_id) == 1  # the label's own is text
    answer = line.family.parts.tokenizer.decode(ids)
    (found,) = line.family.parse_boxes(answer, [Size(90, 50)], POLICY)
    assert found.label == box.label
    assert max(abs(a - b) for a, b in zip(found.xyxy, box.xyxy, strict=True)) <= 1


# Real sizes


def test_the_parts_of_a_real_qwen25_are_whole():
    """Qwen2.5-VL-7B by its published numbers, on no device."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        vision_config={"hidden_size": 1280, "out_hidden_size": 3584},
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    counts = count_parts(model, family_class("qwen2_5_vl").facts, trainable=False)
    assert sum(counts.values()) == 8_292_166_656  # half the bytes of the published bf16 weights
    assert counts == {"vision": 631_975_680, "projector": 44_574_464, "language": 7_615_616_512}
