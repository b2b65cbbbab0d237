"""The pictures that trackers are shown: the right ones, upright, with both kinds of boxes."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from PIL import Image as Pictures

from tiny_rows import picture
from vlmtune.data.conversation import Box, Conversation, EncodedImage
from vlmtune.data.media import ImagePolicy
from vlmtune.evaluation.intervals import Estimate
from vlmtune.evaluation.run import Evaluation, Prediction
from vlmtune.training.tracking import predictions
from vlmtune.training.tracking.predictions import drawn, figures, shown

GREEN, ORANGE = (44, 160, 44), (255, 127, 14)


def said(name="row", **changes):
    plain = Prediction(
        id=name,
        question="where?",
        prediction="there",
        references=("here", "over there"),
        finished=True,
        prompt_tokens=3,
        completion_tokens=1,
        scores={"box_iou": 0.25},
    )
    return replace(plain, **changes)


def row(*images, name="row"):
    return Conversation(name, (), tuple(images))


def evaluation(*answers):
    return Evaluation({"box_iou": Estimate(0.5, 0.25, 0.75)}, answers, 64)


def decoded(png):
    return Pictures.open(io.BytesIO(png))


def test_a_row_of_the_table():
    (told,) = shown(evaluation(said()), [row(picture((40, 30)))], ImagePolicy())
    assert (told.id, told.question, told.truth) == ("row", "where?", "here\nover there")
    assert (told.prediction, told.scores) == ("there", {"box_iou": 0.25})
    assert decoded(told.picture).size == (40, 30)


def test_the_same_rows_each_time():
    rows = [row(picture((8, 8), seed=number), name=f"r{number}") for number in range(20)]
    answers = [said(f"r{number}") for number in range(20)]
    told = shown(evaluation(*answers), rows, ImagePolicy())
    assert [each.id for each in told] == [f"r{number}" for number in range(predictions.ROWS)]
    few = shown(evaluation(*answers[10:14]), rows, ImagePolicy())  # of a smaller probe
    assert [each.id for each in few] == ["r10", "r11", "r12", "r13"]


def test_both_boxes_are_drawn_where_they_are():
    large = row(picture((1536, 768), colour="white"))
    answer = said(
        truth=(Box(0, "dog", (200.0, 100.0, 1000.0, 500.0)),),
        boxes=(Box(0, "dog", (600.0, 300.0, 1400.0, 700.0)),),
    )
    image = drawn(large, answer, ImagePolicy())
    assert image.size == (768, 384)  # halved, and so are the boxes
    assert image.getpixel((101, 130)) == image.getpixel((499, 130)) == GREEN
    assert image.getpixel((301, 300)) == image.getpixel((699, 300)) == ORANGE
    assert image.getpixel((250, 200)) == image.getpixel((600, 100)) == (255, 255, 255)


def test_a_box_stands_on_its_own_picture():
    pair = row(picture((400, 200), colour="white"), picture((400, 300), colour="white"))
    answer = said(
        boxes=(Box(1, "", (100.0, 100.0, 300.0, 280.0)),),
        truth=(Box(1, "", (90.0, 90.0, 290.0, 270.0)),),
    )
    image = drawn(pair, answer, ImagePolicy())
    assert image.size == (400 + predictions.GAP + 400, 300)
    left = image.crop((0, 0, 400, 300))
    assert left.getcolors() == [(400 * 300, (255, 255, 255))]
    assert image.getpixel((400 + predictions.GAP + 101, 200)) == ORANGE


def test_labels_can_be_read_on_a_small_picture():
    small = row(picture((48, 32), colour="white"))
    boxes = (Box(0, "dog", (10.0, 10.0, 30.0, 30.0)),)
    assert drawn(small, said(boxes=boxes), ImagePolicy()).width == predictions.SHORTEST
    assert drawn(small, said(), ImagePolicy()).width == 48


def test_the_policy_is_the_runs():
    clear = io.BytesIO()
    Pictures.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear, "PNG")
    image = drawn(row(EncodedImage(clear.getvalue())), said(), ImagePolicy(background="#00ff00"))
    assert image.getpixel((3, 3)) == (0, 255, 0)


@pytest.mark.parametrize("images", [(), (EncodedImage(b"no picture"),)], ids=["none", "damaged"])
def test_without_a_picture(images, caplog):
    (told,) = shown(evaluation(said()), [row(*images)], ImagePolicy())
    assert (told.picture, told.prediction) == (None, "there")
    assert len(caplog.records) == len(images)


def test_figures_have_their_interval():
    assert figures(evaluation(said()), "evaluation") == {
        "evaluation/box_iou": 0.5,
        "evaluation/box_iou_low": 0.25,
        "evaluation/box_iou_high": 0.75,
    }
