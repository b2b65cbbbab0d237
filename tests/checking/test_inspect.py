"""``inspect`` shows what the encoder makes, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image as Pictures
from typer.testing import CliRunner

from planted import boxed, sample, saved, scene, write_dataset
from tiny_rows import row, turn
from vlmtune.checking.inspect import see
from vlmtune.checking.inspect_page import inspect_html
from vlmtune.cli.main import app
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, open_image
from vlmtune.models.encode import IGNORED
from vlmtune.verbs.check import encoder_of

AREA = 56448


@pytest.fixture(scope="module")
def encoder(tiny_base):
    return encoder_of(tiny_base, ImagePolicy(max_pixels=AREA), "Read <|im_end|> this. 读图")


def rows():
    return [
        sample("one", saved(scene(1)), "a scene, 一个场景 🙂", "What <|image_pad|> is it?"),
        sample("asked by contract", saved(scene(2)), r"\frac { 1 } { 2 }", " "),
        boxed("boxes", 3, Box(0, "it", (20, 30, 80, 90)), Box(0, "图", (5, 5, 60, 60))),
        row(turn("user", "no picture"), turn("assistant", "then none"), name="text only"),
        row(
            turn("system", "Be brief."),
            turn("user", 0, 1, "Which?"),
            turn("assistant", " first"),
            turn("user", "Sure?"),
            turn("assistant", "yes\n"),
            images=(saved(scene(4)), saved(scene(5, (90, 200)))),
            name="two turns",
        ),
    ]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.id)
def test_tokens_are_the_encoders(row, encoder):
    seen = see(row, encoder, "train:0")
    tokens = encoder.tokens(row)
    assert seen.input_ids == tokens.ids.tolist()
    assert seen.labels == tokens.labels.tolist()
    assert sum(stretch.tokens for stretch in seen.stretches) == len(tokens)
    assert sum(s.tokens for s in seen.stretches if s.trained) == tokens.trained
    assert sum(s.tokens for s in seen.stretches if s.kind == "image") == tokens.visual


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.id)
def test_kinds_say_who_wrote_what(row, encoder):
    seen = see(row, encoder, "train:0")
    said = dict.fromkeys(("template", "question", "answer", "control"), "")
    for stretch in seen.stretches:
        if stretch.kind != "image":
            said[stretch.kind] += stretch.text
    assert "\ufffd" not in "".join(said.values())
    completed = encoder.complete(row)
    asked = "".join(m.text for m in completed.messages if m.role != "assistant")
    assert said["question"] == asked
    answered = "".join(m.text for m in completed.messages if m.role == "assistant")
    if row.id != "boxes":
        assert said["answer"] == answered
        ends = sum(m.role == "assistant" for m in row.messages)
        assert seen.text_trained.replace("<|im_end|>", "") == answered
        assert seen.text_trained.count("<|im_end|>") == ends
    assert "assistant" in said["template"]


def test_pictures_are_what_the_model_is_given(encoder):
    """Back from the patches: equal to the picture resized by hand, but for a rounding."""
    (picture,) = see(rows()[0], encoder, "train:0").images
    original = open_image(rows()[0].images[0].data, ImagePolicy())
    by_hand = original.resize(tuple(picture.resized), Pictures.Resampling.BICUBIC)
    difference = np.abs(picture.picture.astype(int) - np.asarray(by_hand).astype(int))
    assert difference.max() <= 1
    turned = np.asarray(by_hand.transpose(Pictures.Transpose.FLIP_LEFT_RIGHT)).astype(int)
    assert np.abs(picture.picture.astype(int) - turned).max() > 50, "control: a mirror image"


def test_boxes_move_with_the_resize(encoder):
    (image,) = see(rows()[2], encoder, "train:0").images
    across, down = image.resized.width / 160, image.resized.height / 120
    assert image.marks[0].xyxy == pytest.approx((20 * across, 30 * down, 80 * across, 90 * down))
    assert [mark.label for mark in image.marks] == ["it", "图"]


def test_command(tmp_path, tiny_base):
    folder = write_dataset(tmp_path / "data", rows())
    page = tmp_path / "rows.html"
    arguments = ["inspect", str(folder), "--model", str(tiny_base), "--rows", "9"]
    done = CliRunner().invoke(app, [*arguments, "--prompt", "x", "--html", str(page), "--json"])
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)["rows"]
    assert [row["id"] for row in shown] == [row.id for row in rows()]
    assert set(shown[0]) == {"id", "input_ids", "labels", "text_trained", "images"}
    assert set(shown[0]["images"][0]) == {"size", "resized", "tokens"}
    trained = [label for label in shown[0]["labels"] if label != IGNORED]
    assert 0 < len(trained) < len(shown[0]["labels"])
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "http-equiv" in text
    people = CliRunner().invoke(app, [*arguments, "--ids", "boxes"])
    assert "two turns" not in people.stdout
    assert "boxes" in people.stdout
    wrong = CliRunner().invoke(app, [*arguments, "--ids", "nobody"])
    assert wrong.exit_code == 2


def test_page_escapes(encoder):
    hostile = "</span><script>alert(1)</script>\u202e"
    seen = see(sample(hostile, saved(scene(8)), hostile, hostile), encoder, hostile)
    text = inspect_html([seen], hostile, hostile)
    assert "<script" not in text
    assert "\u202e" not in text
    assert text == inspect_html([seen], hostile, hostile)
