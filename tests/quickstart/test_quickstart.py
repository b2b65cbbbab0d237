"""``quickstart`` goes the whole way, the same each time, and removes nothing but its own."""

from __future__ import annotations

import functools
import json
import shlex

import pytest

from vlmtune.cli.main import app
from vlmtune.cli.quickstart import _next_lines
from vlmtune.errors import RefusedError, UsageError
from vlmtune.models import builtin
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.quickstart import quickstart

STAGES = (
    "drawing pictures", "preparing rows", "evaluating before", "training", "evaluating after",
    "writing the report", "merging", "asking the merged model",
)  # fmt: skip


class Told(Observer):
    def __init__(self):
        self.stages, self.done = [], 0

    def stage(self, text):
        self.stages.append(text)

    def progress(self, done, total):  # noqa: ARG002
        self.done += 1


@pytest.fixture
def short(monkeypatch, tiny_base):
    """The quickstart on a random model and few rows."""
    monkeypatch.setattr(builtin, "FOLDER", tiny_base)
    return functools.partial(quickstart, rows=32, held_out=4)


def figures(folder):
    steps = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [(folder / f"run/evaluation/{when}/predictions.jsonl").read_text(encoding="utf-8")
               for when in ("before", "after")]  # fmt: skip
    return [json.loads(step)["loss"] for step in steps], answers


def test_it_goes_the_whole_way_and_twice_the_same(short, tmp_path):
    told = Told()
    result = short(tmp_path / "a", task="shapes", observer=told)
    assert [stage for stage in told.stages if stage in STAGES] == list(STAGES)
    assert told.done >= 36
    assert (result["task"], result["recipe"], result["samples"]) == (
        "shapes",
        "quickstart-shapes",
        32,
    )
    assert result["before"].keys() == result["after"].keys() == {"accuracy"}
    for made in ("run/report.html", "model/model.safetensors", "model/contract.json"):
        assert (tmp_path / "a" / made).is_file()
    contract = json.loads((tmp_path / "a/model/contract.json").read_text(encoding="utf-8"))
    assert contract["base"]["id"] == "builtin:base"
    asked = result["predict"]
    assert asked["question"] == "Which shape is this?"
    assert asked["image"].endswith("000035.png")
    assert {"expected", "text", "boxes"} <= asked.keys()
    short(tmp_path / "b", task="shapes")
    assert figures(tmp_path / "a") == figures(tmp_path / "b")
    short(tmp_path / "c", task="shapes", rows=31)  # the control
    assert figures(tmp_path / "a")[0] != figures(tmp_path / "c")[0]


def test_the_next_steps_are_commands(short, tmp_path):
    result = short(tmp_path / "it is here", task="boxes")
    lines = list(_next_lines(result))
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    groups = {group.name for group in app.registered_groups}
    told = [shlex.split(line.partition("#")[0]) for line in lines if "vlmtune " in line]
    assert {words[1] for words in told} == {"predict", "ui", "prepare", "train"}
    assert {words[1] for words in told} <= commands | groups
    (predict,) = [words for words in told if words[1] == "predict"]
    assert predict[2] == str(tmp_path / "it is here" / "model")
    assert predict[predict.index("--prompt") + 1].startswith("Where is the ")


def test_it_replaces_its_own_and_nothing_else(short, tmp_path):
    folder = tmp_path / "q"
    (folder / "run").mkdir(parents=True)
    (folder / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RefusedError, match=r"mine\.txt, which no quickstart made"):
        short(folder, task="shapes")
    with pytest.raises(UsageError, match="expected one of formulas, shapes, boxes"):
        short(folder, task="songs")
    assert (folder / "mine.txt").is_file()
    assert (folder / "run").is_dir()
