"""Questions side by side are several times as fast as one at a time, and answered alike."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "generation.py"
LEAST = 4.0  # of processor time, which another busy process hardly changes


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("generation", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_together_is_several_times_as_fast(benchmark, tmp_path):
    given = benchmark.setting(tmp_path, 2048, rows=32, tokens=16)
    alone = "ours, one at a time"
    table = benchmark.measured(given, 1, [benchmark.BASELINE, alone, benchmark.OURS])
    assert table[benchmark.OURS]["equal_answers"]
    assert table[benchmark.OURS]["processor"]["ratio_median"] > LEAST
    # The control: what is measured is that they are answered together.
    assert table[alone]["processor"]["ratio_median"] < LEAST
