"""Where a step's time goes, and the trace that ``--profile`` writes."""

from __future__ import annotations

import json

import torch
from torch import nn

from tiny_world import MakeRecipe, fingerprint, lines
from vlmtune.cli.progress import Lines, parts_line
from vlmtune.training import timing
from vlmtune.training.timing import PARTS, Clock
from vlmtune.verbs.train import train


def test_the_parts_make_the_step(lora_run):
    for step in lines(lora_run / "metrics.jsonl"):
        assert set(step["parts"]) == set(PARTS)
        # Features that are kept need no tower.
        assert all(step["parts"][part] > 0 for part in PARTS if part != "vision")


class Hands:
    """A clock that stands still but for those that move it."""

    now = 0.0

    def perf_counter(self):
        return self.now


class Working(nn.Module):
    def __init__(self, hands, seconds):
        super().__init__()
        self.hands, self.seconds = hands, seconds

    def forward(self, x):
        self.hands.now += self.seconds
        return x


class Model(nn.Module):
    def __init__(self, hands):
        super().__init__()
        self.tower, self.layers, self.head = (Working(hands, each) for each in (1.0, 2.0, 4.0))

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(self.layers(self.tower(x)))


class Facts:
    vision_tower = "tower"


def test_each_moment_has_its_part(monkeypatch):
    hands = Hands()
    monkeypatch.setattr(timing, "time", hands)
    model, clock = Model(hands), Clock()
    with clock.watching(model, Facts()):
        for _ in range(2):  # the second step begins anew
            clock.begin()
            for _ in range(2):  # forwards
                clock.mark("language")
                model(torch.zeros(1))
                clock.mark("backward")
                hands.now += 8.0
            clock.mark("optimizer")
            hands.now += 16.0
            parts = clock.end(0.5)
            model(torch.zeros(1))  # between steps nothing is counted
            hands.now += 100.0
    assert parts == dict(zip(PARTS, (0.5, 2.0, 4.0, 8.0, 16.0, 16.0), strict=True))
    assert not model.tower._forward_hooks


def test_the_log_names_them(capsys):
    from vlmtune.training.loop import StepReport

    parts = {"data": 1, "loss": 3}
    report = StepReport(10, 20, 0.5, 1e-4, 1.0, True, 8, 100, 50, 0.1, 0, parts=parts)
    assert parts_line(report) == "data 25 %  loss 75 %"
    Lines(10).step(report)
    assert "data 25 %  loss 75 %" in capsys.readouterr().err


def test_profile_writes_a_trace_and_changes_nothing(make_recipe: MakeRecipe, lora_run, tmp_path):
    train(make_recipe(), run_dir=tmp_path / "run", profile=True)
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text(encoding="utf-8"))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::embedding" in names
    assert "Self CPU" in (tmp_path / "run/profile/table.txt").read_text(encoding="utf-8")
    assert fingerprint(tmp_path / "run") == fingerprint(lora_run)
    assert not (lora_run / "profile").exists()
