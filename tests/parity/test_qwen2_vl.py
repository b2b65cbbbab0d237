"""Ours is the reference implementation's, on the real vocabulary and real formulas."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from tiny_rows import as_chat, asked, encoder_of, picture, reference_processor, row, turn
from vlmtune.data.conversation import EncodedImage
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ImageError
from vlmtune.models.encode import IGNORED

PROMPT = "你是一个LaText OCR助手,目标是读取用户输入的照片，转换成LaTex公式。"
FORMULA = ImagePolicy(min_pixels=3136, max_pixels=56448)
END, NEWLINE = 151645, 198
ROWS = 200


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


@pytest.fixture(scope="module")
def encoder(real_family):
    return encoder_of(real_family, FORMULA)


@pytest.fixture(scope="module")
def reference(real_folder):
    return reference_processor(real_folder, min_pixels=3136, max_pixels=56448)


def references_own(reference, row, **options):
    return reference.apply_chat_template(
        as_chat(row), tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def marked(encoded):
    """The template's ``{% generation %}`` spans as transformers found them."""
    return np.array([int(flag) for flag in encoded["assistant_masks"][0]], dtype=bool)


def test_control_tokens_have_their_real_ids(encoder, controls):
    assert {encoder.control_id(token): token for token in controls.values()} == controls
    assert encoder.family.image_token_id == 151655
    assert encoder.end_id == END


def test_formulas_are_encoded_as_the_reference_does(encoder, reference, formulas):
    """The same ids, the same grid, the same pixels to the bit."""
    for formula in formulas:
        theirs = references_own(reference, formula)
        ours = encoder.encode(formula)
        np.testing.assert_array_equal(ours.tokens.ids, theirs["input_ids"][0].numpy())
        np.testing.assert_array_equal(ours.tokens.image_mask, theirs["mm_token_type_ids"][0] == 1)
        assert torch.equal(ours.vision["image_grid_thw"], theirs["image_grid_thw"])
        assert torch.equal(ours.vision["pixel_values"], theirs["pixel_values"])


def test_another_picture_or_limit_is_not_equal(encoder, reference, formulas):
    """The control of the test above: it would see a swapped picture and another area."""
    first, second = formulas[0], formulas[1]
    theirs = references_own(reference, first)
    other = encoder.encode(asked(PROMPT, first.answer, *second.images))
    assert not torch.equal(other.vision["pixel_values"], theirs["pixel_values"])
    smaller = encoder_of(encoder.family, ImagePolicy(max_pixels=3136)).encode(first)
    assert len(smaller.tokens) < theirs["input_ids"].shape[1]


def test_labels_stand_where_the_training_template_marks_them(
    encoder, reference, formulas, training_template
):
    """Ours = TRL's ``{% generation %}`` span without the newline after ``<|im_end|>``.

    The span is the answer, ``<|im_end|>`` and ``\\n``. A model that generates never comes to that
    newline, since it stops at ``<|im_end|>``: we do not train it.
    """
    for formula in formulas:
        theirs = references_own(
            reference, formula, chat_template=training_template, return_assistant_tokens_mask=True
        )
        ids = theirs["input_ids"][0].numpy()
        mask = marked(theirs)
        ours = encoder.tokens(formula)
        np.testing.assert_array_equal(ours.ids, ids)
        newline = mask & (ids == NEWLINE) & (np.roll(ids, 1) == END)
        assert newline.sum() == 1
        np.testing.assert_array_equal(ours.labels != IGNORED, mask & ~newline)


def test_labels_of_several_turns_stand_there_too(encoder, reference, training_template):
    talk = row(
        turn("system", "Be brief."),
        turn("user", 0, "What is this?"),
        turn("assistant", "A horse.\nA brown one."),
        turn("user", "And", 1, "this?"),
        turn("assistant", "两只狗 🐕"),
        images=(picture((200, 80)), picture((60, 90))),
    )
    theirs = references_own(
        reference, talk, chat_template=training_template, return_assistant_tokens_mask=True
    )
    ids = theirs["input_ids"][0].numpy()
    mask = marked(theirs)
    newline = mask & (ids == NEWLINE) & (np.roll(ids, 1) == END)
    ours = encoder.encode(talk)
    assert newline.sum() == 2
    np.testing.assert_array_equal(ours.tokens.ids, ids)
    np.testing.assert_array_equal(ours.tokens.labels != IGNORED, mask & ~newline)
    assert torch.equal(ours.vision["pixel_values"], theirs["pixel_values"])


def test_questions_are_asked_as_the_reference_does(encoder, reference, formulas):
    for formula in formulas[:20]:
        theirs = references_own(reference, formula.prompt(), add_generation_prompt=True)
        ours = encoder.tokens(formula, ask=True)
        np.testing.assert_array_equal(ours.ids, theirs["input_ids"][0].numpy())


def test_an_answer_that_opens_with_a_newline_differs_from_the_reference(encoder, reference):
    """Stated, not hidden: the tokenizer would merge the newline into ``assistant\\n``.

    At inference the prompt ends after that newline, so such a merged token is never seen there.
    """
    formula = asked("Read.", "\nx", picture())
    theirs = references_own(reference, formula)["input_ids"][0].tolist()
    ours = encoder.tokens(formula).ids.tolist()
    asking = encoder.tokens(formula, ask=True).ids.tolist()
    assert ours != theirs
    assert ours[: len(asking)] == asking
    assert theirs[: len(asking)] != asking


# Golden values


def test_resized_sizes_are_the_published_ones(golden, real_family):
    checked = 0
    for case in golden["image_preprocessing"]["qwen2vl_smart_resize_factor28"]:
        policy = ImagePolicy(
            min_pixels=case.get("min_pixels", 56 * 56),
            max_pixels=case.get("max_pixels", 28 * 28 * 1280),
        )
        table = dict(case.get("table_h_w", {}))
        if "expect" in case:
            table["x".join(map(str, case["hw"]))] = case["expect"]
        for source, (height, width) in table.items():
            h, w = map(int, source.split("x"))
            assert real_family.resized(Size(w, h), policy) == (width, height)
            assert real_family.visual_tokens(Size(w, h), policy) == height * width // 784
            checked += 1
    assert checked == 20


def test_a_stretched_picture_is_refused(golden, real_family):
    """The reference allows 200 : 1, and raises above it."""
    (case,) = (
        case
        for case in golden["image_preprocessing"]["qwen2vl_smart_resize_factor28"]
        if "error" in case
    )
    height, width = case["example_hw"]
    with pytest.raises(ImageError, match="200") as caught:
        real_family.resized(Size(width, height), FORMULA)
    assert caught.value.code == "image_too_stretched"
    assert real_family.visual_tokens(Size(200 * height, height), FORMULA)


def test_grid_and_patches_are_the_published_ones(golden, real_family):
    (case,) = (
        case
        for case in golden["image_preprocessing"]["qwen2vl_smart_resize_factor28"]
        if "expect_grid" in case
    )
    encoder = encoder_of(real_family, ImagePolicy(min_pixels=56 * 56, max_pixels=28 * 28 * 1280))
    image = picture(tuple(case["hw"]), colour="#804020")
    vision = encoder.encode(asked("?", "!", image)).vision
    assert vision["image_grid_thw"].tolist() == [case["expect_grid"]]
    assert list(vision["pixel_values"].shape) == case["pixel_values_shape"]


def test_the_prompt_of_a_published_run_has_its_token_counts(golden, real_family):
    """A cookbook's usage block: 680 prompt tokens, 651 of them the image's; 66 answered.

    The block does not count ``<|im_end|>``, which we train.
    """
    run = golden["token_counts"]["qwen2_5_vl_real_run"]
    encoder = encoder_of(real_family, ImagePolicy(max_pixels=12845056))
    row = asked("Read all the text in the image.", run["completion"], picture((576, 864)))
    question, whole = encoder.tokens(row, ask=True), encoder.tokens(row)
    assert len(question) == run["prompt_tokens"] == 680
    assert question.visual == run["image_tokens"] == 651
    assert whole.trained - 1 == run["completion_tokens"] == 66


def test_rendered_ids_begin_as_the_references_tests_say(golden, encoder):
    expected = golden["chat_template"]["qwen2_vl_ids_prefix"]["input_ids[:17]"]
    row = asked("What kind of dog is this?", "A terrier.", picture((280, 140)))
    assert encoder.tokens(row, ask=True).ids[:17].tolist() == expected


def test_positions_are_the_docstrings(golden, real_family):
    """``get_rope_index`` documents a video of three frames; its first frame is our picture.

    Height and width of that frame are the published ones. Time stands still in a picture, and text
    goes on after the largest position so far: 2 after a picture of 2 x 2, not 3.
    """
    video = golden["mrope_position_ids"]["qwen2_vl grid t=3 h=2 w=2 (after merge) + 5 text"]
    encoder = encoder_of(real_family, ImagePolicy(min_pixels=3136, max_pixels=3136))
    row = asked("a b c d", "x", picture((56, 56)))
    encoded = encoder.encode(row)
    first = int(np.flatnonzero(encoded.tokens.image_mask)[0])
    assert encoded.tokens.visual == 4
    positions = encoded.positions[:, first : first + 9]
    start = int(encoded.positions[1, first])
    assert start == first
    assert (positions[1] - start).tolist() == [*video["t"][:4], 2, 3, 4, 5, 6]
    assert (positions[2] - start).tolist() == [*video["h"][:4], 2, 3, 4, 5, 6]
    assert (positions[3] - start).tolist() == [*video["w"][:4], 2, 3, 4, 5, 6]
    assert positions[0].tolist() == list(range(first, first + 9))
