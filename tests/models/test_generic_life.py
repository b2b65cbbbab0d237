"""A class without a family goes the whole way: trained, merged with proof, evaluated."""

from __future__ import annotations

import pytest

import generic_models
from tiny_world import tiny_recipe
from vlmtune.verbs.evaluate import evaluate
from vlmtune.verbs.merge import merge
from vlmtune.verbs.train import train


@pytest.mark.slow
def test_a_class_that_nobody_knew_is_trained_merged_and_evaluated(tiny_data, tmp_path):
    base = generic_models.aya_vision(tmp_path / "base")
    recipe = tiny_recipe(base, tiny_data, image={}, training__max_steps=2)
    train(recipe, run_dir=tmp_path / "run")
    merged = merge(tmp_path / "run", tmp_path / "model", dtype="fp32", device="cpu")
    assert merged["changed"]["language"] > 0
    assert merged["max_logit_difference"] < 1e-4
    measured = evaluate(tmp_path / "model", data=tiny_data, out=tmp_path / "eval", limit=2)
    assert measured["samples"] == 2
