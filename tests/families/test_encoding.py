"""Ids and pixels are those of the family's own processor, and only the answers are trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from families.references import REFERENCES
from tiny_rows import as_chat, asked, mixed_rows, picture, row, turn
from vlmtune.models.encode import IGNORED
from vlmtune.models.plain_text import control_tokens

ROWS = mixed_rows(12, seed=5)


@pytest.fixture(scope="session")
def reference(folder, name):
    """transformers' own processor of the family."""
    return REFERENCES[name](folder)


def theirs_of(reference, conversation, *, ask=False):
    chat = as_chat(conversation.prompt() if ask else conversation)
    return reference.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=ask
    )


def spoken(encoder, conversation):
    """Ids without the ends that the template does not write."""
    tokens = encoder.tokens(conversation)
    if not encoder.adds_end:
        return tokens.ids
    return tokens.ids[(tokens.labels == IGNORED) | (tokens.ids != encoder.end_id)]


@pytest.mark.parametrize("conversation", ROWS, ids=lambda row: row.id)
def test_a_row_is_what_the_processor_makes_of_it(encoder, reference, conversation):
    theirs = theirs_of(reference, conversation)
    np.testing.assert_array_equal(spoken(encoder, conversation), theirs["input_ids"][0].numpy())
    ours = encoder.encode(conversation)
    batch = {**ours.vision, "image_mask": torch.from_numpy(ours.tokens.image_mask)[None]}
    for name, tensor in encoder.family.vision_arguments(batch).items():
        if name in theirs:
            assert torch.equal(tensor, theirs[name]), name


def test_a_question_is_what_the_processor_makes_of_it(encoder, reference):
    for conversation in (ROWS[0], asked("What?", "x", picture((70, 40)), picture((30, 90)))):
        ours = encoder.tokens(conversation, ask=True)
        if encoder.adds_end and any(
            turn.role == "assistant" for turn in conversation.prompt().messages
        ):
            continue  # of earlier answers the template writes no end
        theirs = theirs_of(reference, conversation, ask=True)
        np.testing.assert_array_equal(ours.ids, theirs["input_ids"][0].numpy())


def test_another_picture_or_text_is_not_equal(encoder, reference):
    """The control of the tests above."""
    first = asked("What?", "yes", picture((60, 40), seed=1))
    other = asked("What?", "yes", picture((60, 40), seed=2))
    theirs = theirs_of(reference, first)["pixel_values"]
    assert not torch.equal(encoder.encode(other).vision["pixel_values"].flatten(), theirs.flatten())
    assert len(spoken(encoder, asked("What? ", "no", picture()))) != len(spoken(encoder, ROWS[0]))


@pytest.mark.parametrize("conversation", ROWS, ids=lambda row: row.id)
def test_labels_spell_the_answers_and_their_ends(encoder, conversation):
    tokens = encoder.tokens(conversation)
    tokenizer = encoder.family.parts.tokenizer
    end = tokenizer.convert_ids_to_tokens(encoder.end_id)
    ids = tokens.labels[tokens.labels != IGNORED].tolist()
    answers = [
        tokenizer.decode(part, skip_special_tokens=False) for part in split_at(ids, encoder.end_id)
    ]
    said = [
        "".join(part.text for part in message.content).strip()
        for message in conversation.messages
        if message.role == "assistant"
    ]
    assert [answer.removesuffix(end).strip() for answer in answers] == [
        each.strip() for each in said
    ]
    assert all(answer.endswith(end) for answer in answers)
    assert not tokens.image_mask[tokens.labels != IGNORED].any()


def split_at(ids, end):
    parts, part = [], []
    for identifier in ids:
        part.append(identifier)
        if identifier == end:
            parts.append(part)
            part = []
    assert not part, "the last answer has no end"
    return parts


@pytest.mark.parametrize("conversation", ROWS, ids=lambda row: row.id)
def test_asking_is_the_beginning_of_training(encoder, conversation):
    """What is served before an answer is, id for id, what was trained before it."""
    trained, prompt = encoder.tokens(conversation), encoder.tokens(conversation, ask=True)
    np.testing.assert_array_equal(trained.ids[: len(prompt)], prompt.ids)
    assert trained.labels[len(prompt)] != IGNORED


def test_control_tokens_in_a_text_are_text(encoder):
    controls = control_tokens(encoder.family.parts.tokenizer.backend_tokenizer)
    plain = encoder.tokens(row(turn("user", "x"), turn("assistant", "y")))
    spelled = encoder.tokens(
        row(turn("user", "x" + "".join(sorted(controls))), turn("assistant", "y"))
    )
    known = set(controls.values())
    assert sum(i in known for i in spelled.ids) == sum(i in known for i in plain.ids)


def test_pictures_come_back(encoder):
    """What ``inspect`` shows is what the model sees: of the size that headers promise."""
    conversation = asked("?", "x", picture((60, 40), colour="#c81e1e"), picture((33, 50), seed=2))
    encoded, policy = encoder.encode(conversation), encoder.contract.image
    sizes = encoded.tokens.image_sizes
    shown = encoder.family.pictures(encoded.vision, sizes, policy)
    assert len(shown) == len(sizes)
    policy = encoder.family.row_policy(policy, len(sizes))
    for size, seen in zip(sizes, shown, strict=True):
        resized = encoder.family.resized(size, policy)
        assert seen.shape == (resized.height, resized.width, 3)
    middle = shown[0][shown[0].shape[0] // 2, shown[0].shape[1] // 2]
    assert np.abs(middle.astype(int) - (200, 30, 30)).max() <= 1
