"""From rows to a plan: families whose rows may not share a forward."""

from __future__ import annotations

from dataclasses import replace

import generic_models
from tiny_rows import encoder_of, mixed_rows
from vlmtune.data.media import ImagePolicy
from vlmtune.training.config import TrainingConfig
from vlmtune.training.prepare_rows import measure, plan_rows

ROWS = mixed_rows(6, seed=8)


def test_unpacked_rows_are_planned_alone(tmp_path):
    encoder = encoder_of(generic_models.aya_vision(tmp_path / "m"), ImagePolicy())
    measured = measure(ROWS, encoder, lambda *_: None)
    config = TrainingConfig(batch_size=len(ROWS), epochs=1)
    options = {"max_length": 4096, "too_long": "drop", "token_budget": 4096}
    plan, _ = plan_rows(ROWS, measured, config, **options)
    assert [len(pack) for pack in plan.step(1).packs] == [1] * len(ROWS)
    together, _ = plan_rows(ROWS, replace(measured, packs=True), config, **options)
    assert [len(pack) for pack in together.step(1).packs] == [len(ROWS)]
