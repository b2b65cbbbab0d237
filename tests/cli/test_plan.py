"""``plan`` as a command."""

from __future__ import annotations

import pytest


def test_the_command(command, make_recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(make_recipe().to_yaml(), encoding="utf-8")
    done = command("plan", file, "--device", "h200", "--json", "training.batch_size=8")
    assert done.status == 0
    keys = {"peak_memory_bytes", "flops", "tokens", "steps", "trainable_parameters", "parts"}
    assert keys <= done.json.keys()
    assert done.json["device"]["name"] == "h200"
    unknown = command("plan", file, "--device", "nobody")
    assert unknown.status == 2
    assert "nobody" in unknown.message


@pytest.mark.slow
def test_for_people(command, make_recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(make_recipe().to_yaml(), encoding="utf-8")
    shown = command("plan", file, "--device", "h200", "--devices", "8")
    assert shown.status == 0
    for words in ("parameters: vision", "memory of 8 × h200, ddp", "time: ", "fits: "):
        assert words in shown.out
    assert "images: looked at in every epoch: each of several processes" in shown.out
    alone = command("plan", file, "--device", "h200")
    assert "images: 24, each looked at once, not 1.2 times; " in alone.out
