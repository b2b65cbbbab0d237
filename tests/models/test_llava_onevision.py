"""LLaVA-OneVision: one picture or several, and the answer as it is asked for."""

from __future__ import annotations

import pytest
import torch

from tiny_rows import as_chat, asked, changed, encoder_of, lively, picture, row, turn
from vlmtune.batching.collate import pack
from vlmtune.checking.inspect import see
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ModelError
from vlmtune.testing import tiny

OWN = ImagePolicy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("llava_onevision", tmp_path_factory.mktemp("models") / "onevision", seed=3)


@pytest.fixture(scope="module")
def encoder(folder):
    return encoder_of(folder, OWN)


def test_one_picture_has_tiles_and_several_have_none(encoder):
    """As the model was trained: what a picture becomes depends on its being alone."""
    image = picture((140, 140), seed=1)
    alone = encoder.tokens(asked("?", "x", image))
    pair = encoder.tokens(asked("?", "x", image, image))
    assert alone.visual > 2 * pair.visual
    assert pair.visual == 2 * (4 + 1)
    shown = see(asked("?", "x", image, image), encoder, "here").images
    assert [image.tokens for image in shown] == [5, 5]
    assert [image.resized for image in shown] == [Size(28, 28)] * 2
    assert see(asked("?", "x", image), encoder, "here").images[0].tokens == alone.visual


def test_rows_with_one_and_with_several_share_a_batch(encoder, folder):
    model = lively(folder)
    rows = [
        asked("?", "x", picture((140, 90), seed=1)),
        asked("?", "x", picture((50, 90), seed=2), picture((90, 50), seed=3)),
        row(turn("user", "?"), turn("assistant", "x")),
        asked("?", "x", picture((30, 140), seed=4)),
    ]
    packed = pack(encoder.family, [encoder.encode(each) for each in rows]).inputs
    assert packed["batch_num_images"].tolist() == [1, 2, 1]
    with torch.no_grad():
        together = model(**encoder.family.forward_inputs(packed)).logits[0]
        alone = [
            model(
                **encoder.family.forward_inputs(pack(encoder.family, [encoder.encode(each)]).inputs)
            ).logits[0]
            for each in rows
        ]
    error = (together - torch.cat(alone)).abs().max()
    assert error <= 1e-5 * together.abs().max()


def test_the_answer_is_trained_as_it_is_asked_for(encoder):
    """The template writes a blank before an answer's line and asks for it without."""
    tokenizer = encoder.family.parts.tokenizer
    spoken = row(
        turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")
    )
    written = tokenizer.apply_chat_template(as_chat(spoken), tokenize=False)
    assert written.count("assistant \n") == 2
    text = tokenizer.decode(encoder.tokens(spoken).ids)
    assert text == written[: written.rindex(" \n")] + written[written.rindex("\n") :]
    question = tokenizer.apply_chat_template(
        as_chat(spoken.prompt()), tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(encoder.tokens(spoken, ask=True).ids) == question


def test_other_words_are_still_refused(folder, tmp_path):
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    other = template.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\nSure: '")
    assert other != template
    with pytest.raises(ModelError, match="asks for an answer in other words"):
        encoder_of(changed(folder, tmp_path / "other", chat_template_jinja=other), OWN)
