"""Chatting with the native model: the original's answers, turn by turn and word by word."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import pytest
import torch
from PIL import Image as Pictures
from PIL import ImageChops

from tiny_rows import encoder_of, picture
from vlmtune.data.conversation import Box, Image, Message, Text
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import ImageError, RowError, UsageError
from vlmtune.models.load import load_model
from vlmtune.models.qwen_vl import original
from vlmtune.models.qwen_vl.talk import Talk
from vlmtune.models.qwen_vl.tokenization import text_ids
from vlmtune.testing import tiny

NEW_TOKENS = 16  # of the golden chat


def said_by(model, encoder, *arguments, **options):
    return Talk(model, encoder, *arguments, max_new_tokens=NEW_TOKENS, **options)


# The original's answers


@pytest.fixture(scope="module")
def golden_talker(shared_data):
    folder = shared_data / "qwen_vl_golden" / "model"
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    return folder, model, encoder_of(folder, ImagePolicy())


def test_a_conversation_over_two_turns_is_the_originals(golden_talker, golden_model):
    folder, model, encoder = golden_talker
    tokenizer = encoder.family.parts.tokenizer
    first, second = golden_model["chat"]
    talk = said_by(model, encoder)
    talk.ask("hi?", [folder / "a.png"])
    context = original.make_context(tokenizer, first["query"], system=original.SYSTEM)
    # Where no turn ends, the original loses the last token; we do not.
    assert original.decode_answer(tokenizer, context, talk.ids) == first["response"]
    assert talk.answer.startswith(first["response"])

    heard = Message("assistant", (Text(first["response"]),))
    history = replace(talk.conversation, messages=(talk.conversation.messages[0], heard))
    talk = said_by(model, encoder, history)
    talk.ask(second["query"])
    assert list(talk.ids) == golden_model["chat_second_new_ids"]
    context = original.make_context(
        tokenizer,
        second["query"],
        [(first["query"], first["response"])],
        system=original.SYSTEM,
    )
    assert context.ids == golden_model["chat_second_context_ids"]
    assert original.decode_answer(tokenizer, context, talk.ids) == second["response"]
    assert len(talk.conversation.messages) == 4
    # The control: without the first turn it says something else.
    other = said_by(model, encoder)
    other.ask(second["query"])
    assert other.ids != talk.ids


def test_a_streamed_answer_is_the_originals(golden_talker, golden_model):
    folder, model, encoder = golden_talker
    tokenizer = encoder.family.parts.tokenizer
    first, second = golden_model["chat"]
    question = Message("user", (Image(0), Text("hi?")))
    heard = Message("assistant", (Text(first["response"]),))
    talk = said_by(model, encoder)
    image = talk._asked([{"image": folder / "a.png"}]).images
    talk.conversation = replace(talk.conversation, messages=(question, heard), images=image)
    heard_so_far = list(talk.stream(second["query"]))
    yields = [
        original.decode(
            tokenizer,
            talk.ids[: count + 1],
            skip_controls=True,
            keep_tags=True,
            errors="ignore",
        )
        for count in range(len(golden_model["chat_stream_top_k1"]))
    ]
    assert yields == golden_model["chat_stream_top_k1"]
    assert heard_so_far[-1] == talk.answer
    assert all(
        after.startswith(before.rstrip("\ufffd"))
        for before, after in itertools.pairwise(heard_so_far)
    )
    assert len(heard_so_far) == NEW_TOKENS


# Ours


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    folder = tiny("qwen_vl", tmp_path_factory.mktemp("talk") / "model", seed=3)
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    return model, encoder_of(folder, ImagePolicy())


def reading(encoder, text):
    """A ``pick`` that says a text, whatever the model thinks, and ends the turn."""
    tokenizer = encoder.family.parts.tokenizer
    ids = iter([*text_ids(tokenizer, text, "image"), encoder.end_id])
    return lambda _logits: torch.tensor([next(ids)])


def test_boxes_are_drawn_on_the_latest_picture(talker):
    model, encoder = talker
    answer = "<ref>dog</ref><box>(100,100),(500,500)</box>"
    images = [Pictures.new("RGB", (40, 40), "white"), Pictures.new("RGB", (200, 100), "white")]
    talk = said_by(model, encoder, pick=reading(encoder, answer))
    talk._max_new_tokens = 100
    assert talk.drawn() is None
    assert talk.ask("Which?", images) == answer
    drawn = talk.drawn()
    assert drawn.size == (200, 100)
    left, top, right, bottom = ImageChops.difference(drawn, images[1]).getbbox()
    assert abs(right - 100) <= 3
    assert abs(bottom - 50) <= 3
    assert max(left, top) <= 20
    # The answer is history with a box in it, in pixels.
    assert talk.conversation.messages[-1].content == (Box(1, "dog", (20.0, 10.0, 100.0, 50.0)),)
    # A question may hold boxes too, in steps of the grid.
    talk._pick = reading(encoder, "Yes.")
    talk.ask([{"text": "Is "}, {"ref": "this", "box": [[100, 100, 500, 500]]}, {"text": " it?"}])
    asked = talk.conversation.messages[-2].content
    assert asked == (Text("Is "), Box(1, "this", (20.0, 10.0, 100.0, 50.0)), Text(" it?"))
    assert talk.drawn() is None


def test_an_answer_that_nobody_hears_to_its_end_is_forgotten(talker):
    model, encoder = talker
    talk = said_by(model, encoder)
    for _ in talk.stream("hi", [picture().data]):
        break
    assert talk.conversation.messages == ()
    assert talk.ask("hi") == said_by(model, encoder).ask("hi")


def test_images_come_in_every_form(talker, tmp_path):
    model, encoder = talker
    data = picture((30, 20)).data
    (tmp_path / "a.png").write_bytes(data)
    answers = {
        said_by(model, encoder).ask("?", [image])
        for image in (
            data,
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            picture((30, 20)),
            Pictures.open(io.BytesIO(data)),
        )
    }
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("question", "images", "error", "message"),
    [
        ("?", [3], UsageError, "found a int, expected a path"),
        ("?", ["missing.png"], ImageError, "missing.png cannot be read"),
        ("?", ["https://example.org/a.png"], ImageError, "cannot be read"),
        ([{"box": [[1, 2, 3, 4]]}], [], RowError, "no image before it"),
        ([{"video": "x"}], [], RowError, "found the element"),
        ([{"box": [[1, 2, 3]]}], [b""], RowError, "found the element"),
    ],
)
def test_what_cannot_be_asked_is_refused(talker, question, images, error, message):
    with pytest.raises(error, match=message):
        said_by(*talker).ask(question, images)


def test_paths_in_a_text_open_nothing(talker, tmp_path):
    """The original opens whatever stands between the tags, an address as well."""
    model, encoder = talker
    (tmp_path / "a.png").write_bytes(picture().data)
    talk = said_by(model, encoder)
    talk.ask(f"Picture 1: <img>{tmp_path / 'a.png'}</img>\nWhat?")
    assert talk.conversation.images == ()
