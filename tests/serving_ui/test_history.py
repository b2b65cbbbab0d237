"""What is asked after questions, edits and failures; which picture a box is drawn on."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image as Pictures_

from tiny_rows import picture
from vlmtune.data.conversation import Box, Image, Message, Text
from vlmtune.data.drawing import COLOURS
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import ImageError, VlmtuneError
from vlmtune.serving.events import Began, Delta, Ended, Failed
from vlmtune.serving.settings import Settings
from vlmtune.serving.webui.asking import Panel, Side
from vlmtune.serving.webui.history import History, Picture, Reply, Truth, Turn, asked, by_picture
from vlmtune.serving.webui.pictures import Pictures, display_scale
from vlmtune.serving.webui.transcript import transcript, turn_at


def shown(number):
    return Picture(bytes([number]), str(number), Path(f"{number}.png"))


def said(text, state="done"):
    return Reply(text, state=state)


def conversation():
    """Two questions with pictures, answered by two models, and a third one."""
    first = Turn(asked("one", 2), (shown(1), shown(2)), [said("a1"), said("b1")])
    second = Turn(asked("two", 1), (shown(3),), [said("a2"), said("", "failed")])
    return History([first, second, Turn(asked("three", 1), (shown(4),))])


def test_each_model_is_shown_its_own_answers():
    question = conversation().question(0)
    assert question.messages == (
        Message("user", (Image(0), Image(1), Text("one"))),
        Message("assistant", (Text("a1"),)),
        Message("user", (Image(2), Text("two"))),
        Message("assistant", (Text("a2"),)),
        Message("user", (Image(3), Text("three"))),
    )
    assert [image.data for image in question.images] == [b"\1", b"\2", b"\3", b"\4"]


def test_a_question_without_an_answer_leaves_no_trace():
    history = conversation()
    question = history.question(1)
    assert [message.text for message in question.messages] == ["one", "b1", "three"]
    assert question.messages[-1].content == (Image(2), Text("three"))
    # The box's picture is counted in what this model was shown, not in the conversation.
    assert [one.sha256 for one in history.shown_to(1)] == ["1", "2", "4"]
    assert [one.sha256 for one in history.shown_to(0)] == ["1", "2", "3", "4"]


def test_a_broken_off_answer_stays_as_far_as_it_went():
    history = conversation()
    history.turns[1].replies[1] = said("b2 be", "stopped")
    assert [message.text for message in history.question(1).messages][3] == "b2 be"
    history.turns[1].replies[1] = said("", "stopped")
    assert len(history.question(1).messages) == 3


def test_edit_and_again_forget_what_came_later():
    history = conversation()
    run = history.run
    history.edit(1, "TWO")
    assert [turn.text for turn in history.turns] == ["one", "TWO"]
    assert history.turns[1].parts == (Image(0), Text("TWO"))
    assert history.turns[1].replies == []
    assert history.run > run
    history.again(0)
    assert [turn.text for turn in history.turns] == ["one"]
    assert history.pictures == 2


def test_an_edited_example_has_no_truth_any_more():
    for text, left in (("q", True), ("other", False)):
        history = History([Turn((Text("q"), Image(0)), (shown(1),), truth=Truth("t"))])
        history.edit(0, text)
        assert (history.turns[0].truth is not None) == left
        # Asked as in the data set for as long as it is the data set's question.
        assert history.turns[0].parts == ((Text("q"), Image(0)) if left else (Image(0), Text(text)))


def test_a_system_turn_and_clearing():
    history = conversation()
    history.system = Message("system", (Text("be brief"),))
    assert history.question(0).messages[0].role == "system"
    history.clear()
    assert (history.turns, history.system) == ([], None)


def test_boxes_by_picture():
    boxes = [Box(1, "b", (0, 0, 1, 1)), Box(0, "a", (0, 0, 1, 1)), Box(1, "c", (0, 0, 1, 1))]
    found = by_picture([*boxes, Box(7, "nowhere", (0, 0, 1, 1))], 2)
    assert {place: [box.label for box in own] for place, own in found.items()} == {
        0: ["a"],
        1: ["b", "c"],
    }


def test_boxes_are_drawn_on_their_picture(tmp_path):
    pictures = Pictures(tmp_path, ImagePolicy())
    white, grey = (
        pictures.show(picture((100, 50), colour=colour).data) for colour in ("white", "#808080")
    )
    (drawn,) = pictures.draw([Box(1, "", (20, 10, 60, 40))], [white, grey])
    with Pictures_.open(drawn) as opened:
        scale = display_scale((100, 50))
        assert opened.size == (round(100 * scale), round(50 * scale))
        line = tuple(int(COLOURS[0][place : place + 2], 16) for place in (1, 3, 5))
        for x, y in ((20, 25), (60, 25), (40, 10), (40, 40)):  # each side's middle
            near = opened.convert("RGB").crop(
                (int(x * scale) - 6, int(y * scale) - 6, int(x * scale) + 7, int(y * scale) + 7)
            )
            assert any(
                max(abs(a - b) for a, b in zip(pixel, line, strict=True)) < 40
                for _, pixel in near.getcolors(999)
            )
        assert opened.convert("RGB").getpixel((3, 3)) == (128, 128, 128)
    assert pictures.draw([], [white, grey]) == ()


def test_a_picture_beyond_the_policy_is_refused(tmp_path):
    pictures = Pictures(tmp_path, ImagePolicy(max_source_pixels=100))
    with pytest.raises(ImageError) as caught:
        pictures.show(picture((11, 10)).data)
    assert caught.value.code == "image_too_large"
    with pytest.raises(ImageError):
        pictures.show(b"<svg/>")
    assert list(tmp_path.iterdir()) == []


class Script:
    """An engine that says what it is told; the sides are told apart by the model's name."""

    def __init__(self, said):
        self.said, self.asked, self.cancelled = said, [], []

    def submit(self, question, settings, sink, *, model):
        self.asked.append((model, question, settings))
        for event in self.said[model]:
            if isinstance(event, VlmtuneError):
                raise event
            sink(event)
        script = self

        class Asking:
            def cancel(self):
                script.cancelled.append(model)

        return Asking()


class Model:
    def __init__(self, name):
        self.name = name
        self.encoder = self

    def complete(self, conversation):
        return conversation


def panel(tmp_path, **said):
    script = Script(said)
    sides = [Side(name, script, Model(name)) for name in said]
    return script, Panel(sides, Pictures(tmp_path, ImagePolicy()))


def ended(text, reason="stop", *boxes):
    return Ended(0, text, boxes, reason, 3)


def test_both_models_are_asked_and_followed(tmp_path):
    script, both = panel(
        tmp_path,
        tuned=[Began(7), Delta(0, "a"), Delta(0, "b"), ended("ab")],
        base=[Began(7), Delta(0, "x"), ended("xy", "length")],
    )
    history = History([Turn(asked("q", 0))])
    settings = Settings(seed=1)
    list(both.answers(history, settings))
    first, second = history.turns[0].replies
    assert (first.text, first.state, first.prompt_tokens, first.tokens) == ("ab", "done", 7, 3)
    assert (second.text, second.state) == ("xy", "length")
    assert script.asked[0][1:] == script.asked[1][1:]


def test_one_model_fails_and_the_other_answers(tmp_path):
    _, both = panel(
        tmp_path,
        tuned=[Began(7), Failed(VlmtuneError("no memory"))],
        base=[ended("yes")],
        third=[VlmtuneError("the queue is full")],
    )
    history = History([Turn(asked("q", 0))])
    list(both.answers(history, Settings()))
    states = [(reply.state, reply.fault) for reply in history.turns[0].replies]
    assert states == [("failed", "no memory"), ("done", ""), ("failed", "the queue is full")]


def test_a_visitor_who_leaves_cancels_both(tmp_path):
    script, both = panel(tmp_path, tuned=[Delta(0, "half")], base=[])
    history = History([Turn(asked("q", 0))])
    answers = both.answers(history, Settings())
    next(answers)
    next(answers)
    answers.close()
    assert script.cancelled == ["tuned", "base"]
    assert [(r.text, r.state) for r in history.turns[0].replies] == [
        ("half", "stopped"),
        ("", "stopped"),
    ]


def test_another_question_ends_the_last_answer(tmp_path):
    script, one = panel(tmp_path, tuned=[Delta(0, "half")])
    history = History([Turn(asked("q", 0))])
    answers = one.answers(history, Settings())
    next(answers)
    history.clear()
    assert list(answers) == []
    assert script.cancelled == ["tuned"]


def test_every_message_leads_back_to_its_turn():
    history = conversation()
    history.turns[0].truth = Truth("t", (Path("t.png"),))
    for side in (0, 1):
        messages = transcript(history, side, "en")
        starts = [place for place, one in enumerate(messages) if one["role"] == "user"]
        turns = [turn_at(history, side, place) for place in range(len(messages))]
        expected = [sum(start <= place for start in starts) - 1 for place in range(len(messages))]
        assert turns == expected
        assert set(turns) == {0, 1, 2}
