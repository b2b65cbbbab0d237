"""LLaVA 1.5: what is cut off, the end that its template lacks, boxes in a padded square."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pictures

from families.references import REFERENCES
from tiny_rows import as_chat, asked, changed, encoder_of, picture, row, trained_text, turn
from vlmtune.batching.collate import pack
from vlmtune.checking.rows import size_notes
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ModelError, UsageError
from vlmtune.models.encode import IGNORED
from vlmtune.models.families import family_class, load_family
from vlmtune.models.llava import GRID, padded
from vlmtune.testing import tiny
from vlmtune.tuning.parts import count_parts, part_of

OWN, SQUEEZED = ImagePolicy(), ImagePolicy(size=(56, 56))
corners = st.integers(0, GRID)
sizes = st.builds(Size, st.integers(1, 8000), st.integers(1, 8000))
labels = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), max_size=12).filter(
    lambda label: not set("[]").intersection(label) and label == label.strip(" \t,;.")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("llava", tmp_path_factory.mktemp("models") / "llava", seed=3)


@pytest.fixture(scope="module")
def encoder(folder):
    return encoder_of(folder, OWN)


@pytest.fixture(scope="module")
def family(encoder):
    return encoder.family


def drawn(size, seed=0):
    return Pictures.open(io.BytesIO(picture(size, seed=seed).data)).convert("RGB")


def raw(pieces):
    return "".join(piece.text for piece in pieces)


def with_config(folder, to, **values):
    """A copy of a model folder whose ``config.json`` says otherwise."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, value in values.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return changed(folder, to, config_json=json.dumps(config))


def padding(family):
    """The family with the line's own image processor, which pads to a square."""
    from transformers import LlavaImageProcessorPil

    processor = LlavaImageProcessorPil(**{**family.parts.vision, "do_pad": True})
    return type(family)(
        replace(family.parts, image_processor=processor, vision=processor.to_dict())
    )


# Pixels


@pytest.mark.parametrize("size", [(64, 48), (56, 56), (3, 5), (300, 31), (31, 300), (57, 200)])
def test_what_is_cut_off_is_black(family, size):
    """The picture comes back whole and in its place, as big as it was before the cut."""
    image = Pictures.new("RGB", size, "#c8c8c8")
    vision = family.image_inputs([image], OWN)
    (seen,) = family.pictures(vision, [Size(*size)], OWN)
    resized = family.resized(Size(*size), OWN)
    assert seen.shape == (resized.height, resized.width, 3)
    assert min(resized) == 56
    lit = seen.mean(axis=2) > 100
    assert lit.mean() == pytest.approx(family.visible(Size(*size), OWN))
    rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    assert (len(rows), len(columns)) == (56, 56)
    assert rows[0] == (resized.height - 56) // 2
    assert columns[0] == (resized.width - 56) // 2


def test_the_square_of_the_tower_squeezes_the_whole_picture(family):
    image = drawn((120, 40))
    vision = family.image_inputs([image], SQUEEZED)
    direct = image.resize((56, 56), Pictures.Resampling.BICUBIC)
    (seen,) = family.pictures(vision, [Size(120, 40)], SQUEEZED)
    np.testing.assert_array_equal(seen, np.asarray(direct))
    assert family.visible(Size(120, 40), SQUEEZED) == 1
    assert family.visible(Size(120, 40), OWN) == pytest.approx(1 / 3)
    assert not torch.equal(
        family.image_inputs([image], OWN)["pixel_values"], vision["pixel_values"]
    )


def test_another_size_is_refused(family):
    with pytest.raises(UsageError, match=r"image\.size: found \[28, 56\].*\[56, 56\] alone"):
        family.settle(ImagePolicy(size=(28, 56)))
    assert family.settle(family.settle(SQUEEZED)) == SQUEEZED


def test_check_says_what_is_cut_off(encoder, family):
    notes = list(size_notes(Size(120, 40), encoder))
    assert [note.code for note in notes] == ["image_cropped"]
    assert "120 x 40 becomes 168 x 56 pixels, of which the model sees the middle 33%" in str(notes)
    assert list(size_notes(Size(57, 56), encoder)) == []
    squeezed = encoder_of(family, SQUEEZED)
    assert "image_cropped" not in [note.code for note in size_notes(Size(120, 40), squeezed)]


@pytest.mark.parametrize("size", [(64, 48), (56, 56), (9, 200), (200, 1), (3, 5)])
def test_a_processor_that_pads_shows_everything(family, size):
    other = padding(family)
    vision = other.image_inputs([Pictures.new("RGB", size, "#c81e1e")], OWN)
    (seen,) = other.pictures(vision, [Size(*size)], OWN)
    resized = other.resized(Size(*size), OWN)
    assert seen.shape == (resized.height, resized.width, 3)
    assert max(resized) == 56
    middle = seen[seen.shape[0] // 2, seen.shape[1] // 2].astype(int)
    blurred = min(resized) < 5
    assert blurred or np.abs(middle - (200, 30, 30)).max() <= 1
    assert other.visible(Size(*size), OWN) == 1
    whole = other.image_inputs([drawn(size)], SQUEEZED)["pixel_values"]
    assert torch.equal(whole, family.image_inputs([drawn(size)], SQUEEZED)["pixel_values"])


@given(sizes, st.integers(28, 400))
def test_a_padded_picture_lies_in_its_square(size, side):
    left, top, right, bottom = padded(size, side)
    assert 0 <= left < right <= side
    assert 0 <= top < bottom <= side


@pytest.mark.parametrize(
    ("tower", "strategy", "tokens"),
    [
        ("clip_vision_model", "default", 16),
        ("clip_vision_model", "full", 17),
        ("siglip_vision_model", "full", 16),
    ],
)
def test_tokens_of_other_towers_are_those_of_the_model(folder, tmp_path, tower, strategy, tokens):
    """The reference is the model itself: its features and the row's places have to match."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    other = with_config(
        folder,
        tmp_path / "other",
        vision_config={"model_type": tower},
        vision_feature_select_strategy=strategy,
    )
    encoder = encoder_of(other, OWN)
    assert encoder.family.visual_tokens(Size(99, 9), OWN) == tokens
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(other))
    pixels = encoder.family.image_inputs([drawn((99, 9))], OWN)["pixel_values"]
    with torch.no_grad():
        features = model.get_image_features(pixels).pooler_output
    assert [len(each) for each in features] == [tokens]


def test_a_tower_of_many_sizes_is_refused(folder, tmp_path):
    """Pixtral's models call themselves llava, too."""
    other = with_config(folder, tmp_path / "other", vision_config={"model_type": "pixtral"})
    with pytest.raises(ModelError, match=r"vision towers clip_vision_model.*has 'pixtral'"):
        load_family(str(other))


# Text


def test_every_answer_gets_an_end(encoder):
    """As in the data that the model was trained on; its template on the hubs writes none."""
    tokenizer = encoder.family.parts.tokenizer
    spoken = row(
        turn("user", "hi"), turn("assistant", "yes."), turn("user", "more"), turn("assistant", "no")
    )
    tokens = encoder.tokens(spoken)
    published = "USER: hi ASSISTANT: yes.</s>USER: more ASSISTANT: no</s>"
    assert tokens.ids.tolist()[:-1] == tokenizer(published)["input_ids"]
    assert tokenizer.decode(tokens.ids[-1:]) == ""  # the blank that the template ends with
    assert tokens.labels[-1] == IGNORED
    assert trained_text(encoder, spoken) == "yes.</s> no</s>"
    assert encoder.adds_end
    assert encoder.lead == " "


def test_images_stand_before_texts_whatever_their_order(encoder, folder):
    reference = REFERENCES["llava"](folder)
    images = (picture((60, 40), seed=1), picture((40, 60), seed=2))
    spoken = row(turn("user", "a", 0, "b", 1, "c"), turn("assistant", "x"), images=images)
    theirs = reference.apply_chat_template(
        as_chat(spoken), tokenize=True, return_dict=True, return_tensors="pt"
    )
    ours = encoder.encode(spoken)
    ids = ours.tokens.ids[ours.tokens.ids != encoder.end_id]
    np.testing.assert_array_equal(ids, theirs["input_ids"][0].numpy())
    assert torch.equal(ours.vision["pixel_values"], theirs["pixel_values"])


# Boxes


@given(corners, corners, corners, corners, labels, sizes)
def test_what_was_parsed_renders_to_the_same_text(family, x1, y1, x2, y2, label, size):
    numbers = ", ".join(f"{value / GRID:.3f}" for value in (x1, y1, x2, y2))
    text = f"{label}: [{numbers}]" if label else f"[{numbers}]"
    (box,) = family.parse_boxes(text, [size], OWN)
    assert box.label == label
    assert raw(family.render_box(box, size, OWN)) == text


@pytest.mark.parametrize("size", [Size(1, 1), Size(997, 1003), Size(5304, 3540), Size(28, 8000)])
def test_every_step_of_the_grid_survives(family, size):
    for value in range(GRID + 1):
        text = f"[{value / GRID:.3f}, {value / GRID:.3f}, {value / GRID:.3f}, {value / GRID:.3f}]"
        (box,) = family.parse_boxes(text, [size], OWN)
        assert raw(family.render_box(box, size, OWN)) == text


@settings(max_examples=50)
@given(st.data(), sizes)
def test_a_rendered_box_is_half_a_step_off_at_most(family, data, size):
    xyxy = tuple(data.draw(st.floats(0, side)) for side in (*size, *size))
    (parsed,) = family.parse_boxes(raw(family.render_box(Box(0, "", xyxy), size, OWN)), [size], OWN)
    assert max(abs(a - b) for a, b in zip(parsed.xyxy, xyxy, strict=True)) <= (
        max(size) / GRID / 2 + 1e-6
    )


def test_boxes_are_fractions_of_the_padded_square(family):
    """A picture of 200 x 100 lies 50 pixels below the top of its square."""
    box = Box(0, "dog", (0.0, 0.0, 100.0, 100.0))
    assert raw(family.render_box(box, Size(200, 100), OWN)) == "dog: [0.000, 0.250, 0.500, 0.750]"
    box = Box(0, "", (0.0, 0.0, 100.0, 100.0))
    assert raw(family.render_box(box, Size(100, 200), OWN)) == "[0.250, 0.000, 0.750, 0.500]"


def test_published_answers_are_read(family):
    """With two decimals, in a sentence, one after the other; on the latest picture."""
    text = (
        "dog: [0.25, .5, 1.0, 1], cat: [0, 0, 0.5, 0.5]\nThe red ball is at [0.1, 0.2, 0.3, 0.4]."
    )
    boxes = family.parse_boxes(text, [Size(9, 9), Size(100, 100)], OWN)
    assert [(box.image, box.label) for box in boxes] == [(1, "dog"), (1, "cat"), (1, "")]
    assert boxes[0].xyxy == (25, 50, 100, 100)
    assert boxes[2].xyxy == pytest.approx((10, 20, 30, 40))
    assert family.parse_boxes(text, [], OWN) == []


@pytest.mark.parametrize(
    "text", ["", "0.1, 0.2, 0.3, 0.4", "[0.1, 0.2, 0.3]", "[12, 3, 40, 5]", "[-0.1, 0, 1, 1]"]
)
def test_what_is_no_box_is_none(family, text):
    assert family.parse_boxes(text, [Size(10, 10)], OWN) == []


# The model


def test_what_never_gets_a_gradient(encoder, folder):
    """The features are those before the last layer; the rest of the tower trains."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    batch = pack(encoder.family, [encoder.encode(asked("?", "yes", picture()))])
    model(**encoder.family.forward_inputs(batch.inputs)).logits.square().mean().backward()
    idle = {name for name, each in model.named_parameters() if each.grad is None}
    last = ("model.vision_tower.encoder.layers.1.", "model.vision_tower.post_layernorm.")
    assert idle == {name for name, _ in model.named_parameters() if name.startswith(last)}


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_names_in_memory_have_parts_though_files_have_others(name, tmp_path):
    """Files keep the names that older versions and other engines know; loading turns them back."""
    from safetensors import safe_open
    from transformers import AutoModelForImageTextToText

    folder = tiny(name, tmp_path / "model")
    facts = family_class(name).facts
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert "language_model.model.norm.weight" in stored
    names = [name for name, _ in model.named_parameters()]
    assert {part_of(name, facts) for name in names} == {"vision", "projector", "language"}
    with pytest.raises(ModelError, match="belongs to no part"):
        part_of("language_model.model.norm.weight", facts)


CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
VICUNA = {"model_type": "llama", "vocab_size": 32064}  # the rest is the default of Llama 7B
MISTRAL = {"model_type": "mistral", "vocab_size": 32064}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 152000,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tower", "text", "billions"),
    [
        ("llava", CLIP_LARGE, VICUNA, {"vision": 0.304, "projector": 0.021, "language": 6.74}),
        (
            "llava_next",
            CLIP_LARGE,
            MISTRAL,
            {"vision": 0.304, "projector": 0.021, "language": 7.24},
        ),
        ("llava_onevision", SIGLIP, QWEN2, {"vision": 0.397, "projector": 0.017, "language": 7.61}),
    ],
)
def test_every_parameter_of_a_real_model_has_a_part(name, tower, text, billions):
    """LLaVA-1.5-7B, LLaVA-v1.6-Mistral-7B and LLaVA-OneVision-7B, without memory."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(name, vision_config=tower, text_config=text)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    counts = count_parts(model, family_class(name).facts, trainable=False)
    assert {part: count / 1e9 for part, count in counts.items()} == pytest.approx(
        billions, rel=0.03
    )
