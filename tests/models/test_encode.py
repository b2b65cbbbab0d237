"""The encoder: what is trained is the assistant's text and its end token, nothing else."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny_rows import (
    as_chat,
    asked,
    encoder_of,
    mixed_rows,
    picture,
    reference_processor,
    row,
    trained_text,
    turn,
)
from vlmtune.data.conversation import Box, Text
from vlmtune.errors import RowError
from vlmtune.models.encode import IGNORED

END = "<|im_end|>"
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
ANSWERS = (
    "x",
    "\nstarts on a new line",
    " starts with a space",
    "ends with a newline\n",
    "🐎🐕",
    "两只狗在沙滩上。",
    "assistant",
    "assistant\nassistant\n",
    "<|im_end|>",
    "a <|image_pad|> b",
    r"\frac { 1 } { 2 }",
    "\t\r\n mixed \u3000 blanks \n\n",
    "a\u0000b",
)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
answers = st.one_of(st.sampled_from(ANSWERS), texts)


def decoded(encoder, tokens):
    return encoder.family.parts.tokenizer.decode(tokens.ids.tolist())


def normal(text):
    """The tokenizer's own normal form; the reference's inputs go through it as well."""
    return unicodedata.normalize("NFC", text)


# Labels


@pytest.mark.parametrize("answer", ANSWERS)
def test_labels_spell_the_answer_and_its_end(encoder, answer):
    assert trained_text(encoder, asked("What?", answer, picture())) == normal(answer) + END


@given(st.lists(st.tuples(texts, answers), min_size=1, max_size=3))
def test_labels_of_several_turns_spell_the_answers_and_their_ends(encoder, turns):
    messages = [
        turn(role, text)
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    assert trained_text(encoder, row(*messages)) == "".join(normal(a) + END for _, a in turns)


def test_every_label_is_the_id_at_its_place(encoder):
    for mixed in mixed_rows(20, seed=1):
        tokens = encoder.tokens(mixed)
        trained = tokens.labels != IGNORED
        np.testing.assert_array_equal(tokens.labels[trained], tokens.ids[trained])
        assert not (trained & tokens.image_mask).any()
        assert not trained[-1]  # the template's newline after the last end


def test_an_answer_in_several_parts_is_one_text(encoder):
    whole = encoder.tokens(row(turn("user", "?"), turn("assistant", "\\frac a b")))
    parts = encoder.tokens(row(turn("user", "?"), turn("assistant", "\\fr", "ac a", " b")))
    np.testing.assert_array_equal(whole.ids, parts.ids)
    np.testing.assert_array_equal(whole.labels, parts.labels)


def test_an_answer_of_boxes_trains_their_control_tokens(encoder):
    box = Box(0, "dog", (0.0, 0.0, 32.0, 24.0))
    spoken = row(turn("user", 0, "Where?"), turn("assistant", box), images=(picture((64, 48)),))
    assert trained_text(encoder, spoken) == (
        "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(0,0),(500,500)<|box_end|><|im_end|>"
    )


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ((turn("user", "?"),), "no_labels"),
        ((turn("system", "Be brief."), turn("user", "?")), "no_labels"),
        ((), "empty_conversation"),
    ],
)
def test_nothing_to_train_on_is_an_error(encoder, messages, code):
    with pytest.raises(RowError) as caught:
        encoder.tokens(row(*messages))
    assert caught.value.code == code


# Questions


@given(texts, answers)
def test_a_question_is_the_beginning_of_its_training_row(encoder, question, answer):
    talk = row(turn("user", "a"), turn("assistant", "b"), turn("user", question))
    whole = row(*talk.messages, turn("assistant", answer))
    training, asking = encoder.tokens(whole), encoder.tokens(whole, ask=True)
    np.testing.assert_array_equal(training.ids[: len(asking)], asking.ids)
    np.testing.assert_array_equal(encoder.tokens(talk, ask=True).ids, asking.ids)
    assert training.labels[len(asking) - 1] == IGNORED
    assert training.labels[len(asking)] != IGNORED


def test_a_question_with_images_is_so_too(encoder):
    for mixed in mixed_rows(20, seed=2):
        training, asking = encoder.encode(mixed), encoder.encode(mixed, ask=True)
        length = len(asking.tokens)
        np.testing.assert_array_equal(training.tokens.ids[:length], asking.tokens.ids)
        assert torch.equal(training.positions[:, :length], asking.positions)
        assert training.vision.keys() == asking.vision.keys()
        for name, tensor in asking.vision.items():
            assert torch.equal(training.vision[name], tensor)


# System turns and prompts


def test_the_templates_own_system_turn_stands_where_there_is_none(encoder):
    assert decoded(encoder, encoder.tokens(asked("Hi", "Ho"))) == (
        DEFAULT_SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    )


def test_the_rows_own_system_turn_stands_above_all(folder):
    own = row(turn("system", "Mine."), turn("user", "Hi"), turn("assistant", "Ho"))
    encoder = encoder_of(folder, system_prompt="Theirs.")
    assert decoded(encoder, encoder.tokens(own)).startswith("<|im_start|>system\nMine.<|im_end|>\n")


@pytest.mark.parametrize("ask", [True, False])
def test_the_contracts_system_turn_stands_above_the_templates(folder, ask):
    encoder = encoder_of(folder, system_prompt="你是一个助手。")
    text = decoded(encoder, encoder.tokens(asked("Hi", "Ho"), ask=ask))
    assert text.startswith("<|im_start|>system\n你是一个助手。<|im_end|>\n<|im_start|>user\n")
    assert text.count("<|im_start|>system") == 1


def test_the_contracts_prompt_stands_where_a_turn_has_no_text(folder):
    encoder = encoder_of(folder, prompt="Read it.")
    image = picture((28, 28))
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    silent = row(turn("user", 0), turn("assistant", "x"), images=(image,))
    blank = row(turn("user", " \n", 0, ""), turn("assistant", "x"), images=(image,))
    box = Box(0, "", (0.0, 0.0, 28.0, 28.0))
    pointing = row(turn("user", 0, box), turn("assistant", "x"), images=(image,))
    blind = row(turn("user", ""), turn("assistant", "x"))
    for given_row, turn_text in (
        (silent, f"{pad}Read it."),
        (blank, f"{pad}Read it."),
        (asked("What?", "x", image), f"{pad}What?"),
        (pointing, f"{pad}<|box_start|>(0,0),(999,999)<|box_end|>"),
        (blind, ""),
    ):
        text = decoded(encoder, encoder.tokens(given_row))
        assert f"<|im_start|>user\n{turn_text}<|im_end|>" in text


def test_a_prompt_is_added_to_every_silent_turn_and_asked_as_trained(folder):
    encoder = encoder_of(folder, prompt="Read it.")
    images = (picture((28, 28)), picture((28, 56)))
    talk = row(
        turn("user", 0),
        turn("assistant", "x"),
        turn("user", 1),
        turn("assistant", "y"),
        images=images,
    )
    training, asking = encoder.tokens(talk), encoder.tokens(talk, ask=True)
    assert decoded(encoder, training).count("Read it.") == 2
    np.testing.assert_array_equal(training.ids[: len(asking)], asking.ids)


# Images


def test_ids_and_pixels_are_the_reference_processors(folder, encoder):
    """Random mixes of images and turns; answers that do not open with a blank."""
    reference = reference_processor(folder, min_pixels=784, max_pixels=7840)
    for mixed in mixed_rows(25, seed=3):
        chat = [
            {**message, "content": [*map(plain, message["content"])]} for message in as_chat(mixed)
        ]
        theirs = reference.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ours = encoder.encode(
            row(*(stripped(message) for message in mixed.messages), images=mixed.images)
        )
        np.testing.assert_array_equal(ours.tokens.ids, theirs["input_ids"][0].numpy())
        pads = int((theirs["input_ids"] == encoder.family.image_token_id).sum())
        assert ours.tokens.visual == pads
        for name, tensor in ours.vision.items():
            assert torch.equal(tensor, theirs[name])


def plain(part):
    return {**part, "text": part["text"].strip()} if part["type"] == "text" else part


def stripped(message):
    content = [Text(p.text.strip()) if isinstance(p, Text) else p for p in message.content]
    return turn(message.role, *content)


def test_images_go_in_in_the_order_of_the_text(encoder):
    red, green = picture((56, 28), colour="red"), picture((28, 56), colour="lime")
    ab = encoder.encode(asked("?", "x", red, green)).vision
    ba = encoder.encode(asked("?", "x", green, red)).vision
    assert ab["image_grid_thw"].tolist() == [[1, 2, 4], [1, 4, 2]]
    assert ba["image_grid_thw"].tolist() == [[1, 4, 2], [1, 2, 4]]
    assert torch.equal(ab["pixel_values"][:8], ba["pixel_values"][8:])
    assert torch.equal(ab["pixel_values"][8:], ba["pixel_values"][:8])
    assert not torch.equal(ab["pixel_values"][:8], ab["pixel_values"][8:])


@pytest.mark.parametrize("places", [(1, 0), (0,), (0, 0), (0, 1, 2), ()])
def test_images_that_are_not_placed_once_and_in_order_are_an_error(encoder, places):
    images = (picture(), picture(colour="red"))
    wrong = row(turn("user", *places, "?"), turn("assistant", "x"), images=images)
    with pytest.raises(RowError) as caught:
        encoder.encode(wrong)
    assert caught.value.code == "image_mismatch"


def test_a_row_without_images_has_no_vision_inputs(encoder):
    encoded = encoder.encode(asked("Hi", "Ho"))
    assert encoded.vision == {}
    assert encoded.tokens.visual == 0
    expected = torch.arange(len(encoded.tokens)).expand(4, -1)
    assert torch.equal(encoded.positions, expected)


def test_headers_give_the_same_tokens_as_pixels(encoder):
    for mixed in mixed_rows(10, seed=4):
        np.testing.assert_array_equal(encoder.tokens(mixed).ids, encoder.encode(mixed).tokens.ids)
