"""What a run was started with, and what differs now."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtune.files import read_lines, write_lines
from vlmtune.recipe import Recipe, load_recipe
from vlmtune.training.prepare_rows import Dropped

logger = logging.getLogger(__name__)

SHOWN = 5

# Where things lie and what they are called does not change a result. What the data's sources are
# is in the data's fingerprint, with their weights.
HARMLESS = (
    "name",
    "description",
    "data.path",
    "data.sources",
    "model.device",
    "model.device_map",
    "training.workers",
    "training.gradient_checkpointing",
    "training.rehearse",
    "training.log_steps",
    "training.keep",
    "training.save_behind",
    "distributed.strategy",
    "distributed.offload",
)

# These decide which rows make which step: no change of them can go on within a run.
FIXED = ("training.batch_size:", "training.seed:")


def record_dropped(ledger: Path, dropped: Sequence[Dropped]) -> None:
    """Note the rows that the plan leaves out, instead of those that an earlier plan did."""
    records: list[dict[str, Any]] = [
        {"step": 0, "event": "dropped", **vars(row)} for row in dropped
    ]
    noted = list(read_lines(ledger))
    if ledger.exists() and [record for record in noted if record["event"] == "dropped"] == records:
        return
    others = [record for record in noted if record["event"] != "dropped"]
    write_lines(ledger, [*records, *others])
    for row in dropped[:SHOWN]:
        logger.warning("row %s is left out: %s", row.id, row.message)
    if len(dropped) > SHOWN:
        logger.warning("… and %d more; see %s", len(dropped) - SHOWN, ledger)


def record_change(ledger: Path, changes: Sequence[str]) -> None:
    """Note that a run goes on although something changed; a torn last line is dropped."""
    write_lines(ledger, [*read_lines(ledger), {"event": "changed", "changes": list(changes)}])


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
