"""Qwen2.5-VL and Qwen3-VL: ours is the reference's, on real settings, formulas and templates."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_rows import (
    as_chat,
    asked,
    encoder_of,
    mixed_rows,
    picture,
    reference_processor,
    row,
    turn,
)
from vlmtune.data.conversation import EncodedImage
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.models.encode import IGNORED, Encoder
from vlmtune.models.families import family_class, load_family
from vlmtune.models.folder import load_config
from vlmtune.tuning.parts import count_parts

PROMPT = "你是一个LaText OCR助手,目标是读取用户输入的照片，转换成LaTex公式。"
END, NEWLINE, IMAGE = 151645, 198, 151655
ROWS = 40
LIMITS = {"min_pixels": 4096, "max_pixels": 56448}


@dataclass(frozen=True)
class Real:
    """A real folder's encoder, and the reference's processor under the same limits."""

    folder: Any
    kind: str
    training_template: str
    encoder: Encoder
    reference: Any


@cache
def family_of(folder: Path):
    """Once a folder: reading a real vocabulary takes a moment."""
    return load_family(str(folder))


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def real(request, shared_data):
    fixture, kind = {
        "qwen2_5_vl": ("real_qwen25", "Qwen2_5_VLProcessor"),
        "qwen3_vl": ("real_qwen3", "Qwen3VLProcessor"),
    }[request.param]
    folder = request.getfixturevalue(fixture)
    templates = shared_data / "model_meta" / "trl_chat_templates"
    return Real(
        folder,
        kind,
        (templates / f"{request.param}_training.jinja").read_text(encoding="utf-8"),
        encoder_of(family_of(folder), ImagePolicy(**LIMITS)),
        reference_processor(folder, kind, **LIMITS),
    )


@pytest.fixture(scope="module")
def formulas(shared_data):
    folder = shared_data / "latex_ocr"
    with (folder / "latex_ocr.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))[:ROWS]
    rows = [
        asked(PROMPT, line["text"], EncodedImage((folder / line["image_path"]).read_bytes()))
        for line in table
    ]
    assert len(rows) == ROWS
    return rows


def theirs_of(reference, conversation, **options):
    return reference.apply_chat_template(
        as_chat(conversation), tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def assert_equal(ours, theirs):
    np.testing.assert_array_equal(ours.tokens.ids, theirs["input_ids"][0].numpy())
    np.testing.assert_array_equal(ours.tokens.image_mask, theirs["mm_token_type_ids"][0] == 1)
    assert torch.equal(ours.vision["image_grid_thw"], theirs["image_grid_thw"])
    assert torch.equal(ours.vision["pixel_values"], theirs["pixel_values"])


def test_formulas_are_encoded_as_the_reference_does(real, formulas):
    """The same ids, the same grid, the same pixels to the bit."""
    assert real.encoder.family.image_token_id == IMAGE
    assert real.encoder.end_id == END
    for formula in formulas:
        assert_equal(real.encoder.encode(formula), theirs_of(real.reference, formula))


def test_they_are_so_within_the_models_own_limits(real, formulas):
    own = encoder_of(real.encoder.family, ImagePolicy())
    reference = reference_processor(real.folder, real.kind)
    for formula in (*formulas[:3], asked("?", "x", picture((900, 400)))):
        assert_equal(own.encode(formula), theirs_of(reference, formula))


def test_another_picture_or_limit_is_not_equal(real, formulas):
    """The control of the tests above: they would see a swapped picture and another area."""
    first, second = formulas[0], formulas[1]
    theirs = theirs_of(real.reference, first)
    other = real.encoder.encode(asked(PROMPT, first.answer, *second.images))
    assert not torch.equal(other.vision["pixel_values"], theirs["pixel_values"])
    smaller = encoder_of(real.encoder.family, ImagePolicy(max_pixels=4096)).encode(first)
    assert len(smaller.tokens) < theirs["input_ids"].shape[1]


def test_labels_stand_where_the_training_template_marks_them(real, formulas):
    """Ours = TRL's ``{% generation %}`` span without the newline after ``<|im_end|>``."""
    talk = row(
        turn("system", "Be brief."),
        turn("user", 0, "What is this?"),
        turn("assistant", "A horse.\nA brown one."),
        turn("user", "And", 1, "this?"),
        turn("assistant", "两只狗 🐕"),
        images=(picture((200, 80)), picture((60, 90))),
    )
    for conversation in (talk, *formulas[:10]):
        theirs = theirs_of(
            real.reference,
            conversation,
            chat_template=real.training_template,
            return_assistant_tokens_mask=True,
        )
        ids = theirs["input_ids"][0].numpy()
        mask = np.array([int(flag) for flag in theirs["assistant_masks"][0]], dtype=bool)
        newline = mask & (ids == NEWLINE) & (np.roll(ids, 1) == END)
        assert newline.sum() == sum(turn.role == "assistant" for turn in conversation.messages)
        ours = real.encoder.tokens(conversation)
        np.testing.assert_array_equal(ours.ids, ids)
        np.testing.assert_array_equal(ours.labels != IGNORED, mask & ~newline)


def test_questions_are_asked_as_the_reference_does(real, formulas):
    for formula in formulas[:10]:
        theirs = theirs_of(real.reference, formula.prompt(), add_generation_prompt=True)
        ours = real.encoder.tokens(formula, ask=True)
        np.testing.assert_array_equal(ours.ids, theirs["input_ids"][0].numpy())


def test_positions_are_the_real_models(real, formulas):
    """``get_rope_index`` of the published configuration; it needs no weights."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(load_config(str(real.folder)))
    seeing = [each for each in mixed_rows(12, seed=4) if each.images]
    for conversation in (*formulas[:10], *seeing):
        encoded = real.encoder.encode(conversation)
        positions, _ = model.model.get_rope_index(
            torch.from_numpy(encoded.tokens.ids)[None],
            torch.from_numpy(encoded.tokens.image_mask).int()[None],
            image_grid_thw=encoded.vision["image_grid_thw"],
        )
        assert torch.equal(encoded.positions[1:], positions[:, 0])


# Golden values


def test_resized_sizes_are_the_published_ones(golden, real_qwen3):
    family = family_of(real_qwen3)
    checked = 0
    for case in golden["image_preprocessing"]["qwen3vl_smart_resize_factor32"]:
        policy = ImagePolicy(
            min_pixels=case.get("min_pixels", 65536), max_pixels=case.get("max_pixels", 16777216)
        )
        table = dict(case.get("table_h_w", {}))
        if "expect" in case:
            table["x".join(map(str, case["hw"]))] = case["expect"]
        for source, (height, width) in table.items():
            h, w = map(int, source.split("x"))
            assert family.resized(Size(w, h), policy) == (width, height)
            assert family.visual_tokens(Size(w, h), policy) == height * width // 1024
            checked += 1
    assert checked == 12


def test_the_prompt_of_a_published_run_has_its_token_counts(golden, real_qwen25):
    """A cookbook's usage block of Qwen2.5-VL: 680 prompt tokens, 651 of them the image's."""
    run = golden["token_counts"]["qwen2_5_vl_real_run"]
    encoder = encoder_of(family_of(real_qwen25), ImagePolicy())
    conversation = asked("Read all the text in the image.", run["completion"], picture((576, 864)))
    question, whole = encoder.tokens(conversation, ask=True), encoder.tokens(conversation)
    assert len(question) == run["prompt_tokens"]
    assert question.visual == run["image_tokens"]
    assert whole.trained - 1 == run["completion_tokens"]


def test_rendered_ids_begin_as_the_references_tests_say(golden, real_qwen3):
    """No system turn of its own."""
    expected = golden["chat_template"]["qwen3_vl_ids_prefix"]["input_ids[:5]"]
    conversation = asked("What kind of dog is this?", "A terrier.", picture((280, 140)))
    tokens = encoder_of(family_of(real_qwen3), ImagePolicy()).tokens(conversation, ask=True)
    assert tokens.ids[:5].tolist() == expected


def test_the_parts_of_the_published_configurations_are_whole(real_qwen25, real_qwen3):
    """Every weight of Qwen2.5-VL-7B and Qwen3-VL-2B, tied ones once, belongs to a part."""
    from transformers import AutoModelForImageTextToText

    found = []
    for folder in (real_qwen25, real_qwen3):
        config = load_config(str(folder))
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        found.append(count_parts(model, family_class(config.model_type).facts, trainable=False))
    assert [sum(counts.values()) for counts in found] == [8_292_166_656, 2_127_532_032]
    # Qwen3-VL's projector is one merger and three of DeepStack.
    qwen3 = {"vision": 306_242_560, "projector": 100_714_496, "language": 1_720_574_976}
    assert found[1] == qwen3
