"""The terminal: history, pictures by path, streaming, and nothing that moves the cursor."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from live_server import PROMPT
from tiny_rows import asked, picture, row, turn
from vlmtune.cli.main import app
from vlmtune.data.conversation import EncodedImage
from vlmtune.models.generate import generate
from vlmtune.serving import batches
from vlmtune.serving.dialogue import Dialogue
from vlmtune.serving.sampling import Pick
from vlmtune.serving.settings import Settings
from vlmtune.verbs.chat import Talk, visible

SETTINGS = Settings(max_tokens=8)


@pytest.fixture
def talk(make_engine, served):
    said = []
    talking = Talk(make_engine(), served, SETTINGS, said.append)
    talking.said = said
    return talking


def answers(served, *rows):
    encoder = served.first.encoder
    found = generate(served.model, encoder, rows, max_new_tokens=8, batch_rows=1)
    return [answer.text for answer in found]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(picture(seed=4).data)
    return path


def test_history_is_kept_until_it_is_cleared(talk, served):
    (first,) = answers(served, asked("Hi", "x").prompt())
    messages = (turn("user", "Hi"), turn("assistant", first), turn("user", "And?"))
    (second,) = answers(served, row(*messages))
    assert talk.hear("Hi")
    assert talk.hear("And?")
    assert talk.hear("/clear")
    assert talk.hear("Hi")
    assert "".join(talk.said) == shown(first) + shown(second) + shown(first)
    assert talk.turns == 3
    assert not talk.hear("/exit")


def shown(text):
    return visible(text) + "\n(cut at the longest answer; --max-new-tokens allows more)\n"


def test_pictures_come_with_the_next_message(talk, served, file):
    image = EncodedImage(file.read_bytes())
    (with_text,) = answers(served, asked("What?", "x", image).prompt())
    talk.hear(f"/image {file}")
    assert talk.said.pop().startswith("PNG, 64 x 48")
    talk.hear("What?")
    assert "".join(talk.said).startswith(visible(with_text))
    talk.hear("/clear")
    talk.said.clear()
    talk.hear(f"/image {file}")
    talk.hear("")  # alone: the prompt that the model was trained with
    (alone,) = answers(served, asked(PROMPT, "x", image).prompt())
    assert "".join(talk.said[1:]).startswith(visible(alone))


def test_mistakes_are_told_and_forgotten(talk, tmp_path):
    (tmp_path / "no.png").write_text("nothing", encoding="utf-8")
    for line, words in (
        ("/image nowhere.png", "cannot be read"),
        (f"/image {tmp_path / 'no.png'}", "no image"),
        (f"/image {tmp_path}", "cannot be read"),
        ("/help", "/image PATH"),
        ("/unknown", "/image PATH"),
    ):
        talk.said.clear()
        assert talk.hear(line)
        assert words in "".join(talk.said)
    talk.said.clear()
    assert talk.hear("")
    assert talk.said == []
    assert talk.hear("Hi")
    assert talk.turns == 1


def test_an_answer_may_be_broken_off(talk):
    pieces = []

    def interrupting(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    talk._write = interrupting
    assert talk.hear("Hi")
    assert pieces[-1] == "\n(broken off)\n"
    talk._write = pieces.append
    assert talk.hear("And?")  # the history goes on with what was said
    assert talk.turns == 1


def test_a_question_that_fails_leaves_no_history(make_engine):
    engine = make_engine()
    dialogue = Dialogue(engine, SETTINGS)
    first = "".join(dialogue.ask("Hi"))
    with pytest.raises(Exception, match="image"):
        list(dialogue.ask("What?", [EncodedImage(b"nothing")]))
    other = Dialogue(engine, SETTINGS)
    assert "".join(other.ask("Hi")) == first
    assert "".join(other.ask("And?")) == "".join(dialogue.ask("And?"))


def test_nothing_moves_the_cursor():
    text = "a\x1b[2Jb\r\x07\u202ec\u2066\n\td\x9b1m👩\u200d🔬 é 结果"
    assert visible(text) == r"a\x1b[2Jb\r\x07\u202ec\u2066" + "\n\td" + r"\x9b1m" + (
        "👩\u200d🔬 é 结果"
    )


def test_the_command(folder, file):
    lines = f"/image {file}\nWhat?\nAnd?\n/exit\nnot read\n"
    options = ["chat", str(folder), "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, [*options, "--json"], input=lines)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == '{"turns": 2, "tokens": {"completion": 8}}'
    assert "PNG, 64 x 48" in done.stderr
    done = CliRunner().invoke(app, options, input="Hi\n")  # the input ends: leave
    assert done.exit_code == 0
    assert done.stdout.count("(cut at") == 1


def test_boxes_are_listed(talk, served, monkeypatch):
    encoder = served.first.encoder
    box = [encoder.control_id("<|box_start|>"), *encoder.text_ids("(0,0),(500,999)"),
           encoder.control_id("<|box_end|>"), encoder.end_id]  # fmt: skip
    spoken = iter(box)
    monkeypatch.setattr(batches, "choose", lambda rows, _: [Pick(next(spoken)) for _ in rows])
    talk._dialogue._settings = Settings(max_tokens=60, stream=True)
    talk._pictures = [EncodedImage(picture((100, 50)).data)]
    talk.hear("Where?")
    assert "picture 1:  [0.0, 0.0, 50.0, 50.0]" in "".join(talk.said)
