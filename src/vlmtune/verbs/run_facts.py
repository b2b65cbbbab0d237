"""What a run was started with, and what differs now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmtune.data.dataset import PreparedDataset
from vlmtune.recipe import Recipe, load_recipe

# Where things lie and what they are called does not change a result.
HARMLESS = ("name", "description", "data.path", "model.device")


def quarantined(dataset: PreparedDataset) -> dict[str, int]:
    """Rows that ``prepare`` kept out of a dataset, by code."""
    path = dataset.path / "summary.json"
    if not path.is_file():
        return {}
    counts: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))["quarantine"]
    return counts


def recipe_changes(path: Path, recipe: Recipe) -> list[str]:
    """Options whose value differs from the stored recipe's; where the data lies does not count."""
    stored = _flat(load_recipe(path).model_dump(mode="json"))
    now = _flat(recipe.model_dump(mode="json"))
    return [
        f"{name}: {stored.get(name)!r} is now {now.get(name)!r}"
        for name in sorted(stored.keys() | now.keys())
        if stored.get(name) != now.get(name)
        and name not in HARMLESS
        and not name.startswith("tracking.")
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
