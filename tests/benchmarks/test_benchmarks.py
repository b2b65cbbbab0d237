"""The benchmarks judge fairly, and those that cannot be run here run end to end when tiny."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(train: float, losses: list[float], *, labels: int = 100, peak: int = 100) -> dict[str, Any]:
    seconds = {"prepare": 1.0, "train": train, "start_load": 2.0, "whole": train + 3}
    return {
        "seconds": seconds,
        "processor": seconds,
        "losses": losses,
        "labels": labels,
        "peak_bytes": peak,
        "versions": {},
    }


def test_ratios_are_to_the_best_of_the_others() -> None:
    from training import summary

    curve = [7.0, 6.0]
    said = summary(
        {
            "vlmtune": [run(10, curve), run(14, curve)],
            "vlmtune bf16": [run(5, [7.01, 6.01])],
            "tutorial": [run(30, curve, peak=300)],
            "trl": [run(24, curve, peak=150)],
            "swift": {"void": "did not install, because the disk is full"},
        }
    )["others_over_ours"]
    assert said["seconds_median"]["training"] == 2.0  # 24 / 12
    assert said["seconds_min"]["training"] == 2.4
    assert said["seconds_min"]["training_bf16"] == 4.8
    assert said["peak_memory"] == 1.5


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (run(1, [7.0, 6.0002]), "losses differ"),
        (run(1, [7.0]), "losses differ"),
        (run(1, [7.0, 6.0], labels=101), "101 label tokens"),
        ({"fault": "no memory"}, "no memory"),
    ],
)
def test_another_job_is_void(other: dict[str, Any], reason: str) -> None:
    from training import summary

    ours, trl = run(10, [7.0, 6.0]), run(20, [7.0, 6.0])
    said = summary({"vlmtune": [ours], "vlmtune bf16": [ours], "trl": [trl], "swift": [other]})
    assert reason in said["systems"]["swift"]["void"]
    assert "void" not in said["systems"]["trl"]
    assert said["others_over_ours"]["seconds_min"]["training"] == 2.0  # the void one is not asked


def test_peers_see_no_newline_after_an_answer(tmp_path: Path) -> None:
    from material import _without_last_newline

    from vlmtune.testing import tiny

    base = tiny("qwen2_vl", tmp_path / "base")
    from transformers import AutoTokenizer

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    theirs = AutoTokenizer.from_pretrained(_without_last_newline(base, tmp_path / "other"))
    stock = AutoTokenizer.from_pretrained(base).apply_chat_template(turns, tokenize=False)
    assert stock.endswith("b<|im_end|>\n")
    assert theirs.apply_chat_template(turns, tokenize=False) == stock.removesuffix("\n")


def test_the_real_sizes_are_those_of_the_2b_model(tmp_path: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    from gpu import real_config
    from vlmtune.testing import tiny

    config = real_config(tiny("qwen2_vl", tmp_path / "tiny"))
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    parts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in (
            ("layers", model.model.language_model.layers),
            ("embedding", model.get_input_embeddings()),
            ("vision", model.model.visual),
        )
    }
    # As published; the tower with its merger.
    assert {name: round(count / 1e9, 3) for name, count in parts.items()} == {
        "layers": 1.310,
        "embedding": 0.233,
        "vision": 0.665,
    }
    assert model.config.tie_word_embeddings


@pytest.mark.slow
@pytest.mark.timeout(1800)  # ten processes, each of which loads everything
def test_the_gpu_benchmark_runs_end_to_end_when_tiny(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--out", str(out)]
    subprocess.run(command, check=True, timeout=1700)
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert {"everything", "documents", "without packing", "without label-only logits"} <= set(runs)
    assert not [run["fault"] for run in runs.values() if "fault" in run]
    # Each measure is exact: without it the run begins with the same loss (bf16 rounds it).
    whole = runs["everything"]
    for name, run in runs.items():
        if name != "documents":
            assert run["first_loss"] == pytest.approx(whole["first_loss"], rel=1e-3), name
