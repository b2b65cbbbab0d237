"""``train`` in several processes, on one machine or on several."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from vlmtune.errors import RecipeError
from vlmtune.recipe import Recipe
from vlmtune.training.distributed.launcher import Launch, start
from vlmtune.verbs.holding import check_strategy

RECIPE = "recipe.yaml"
OPTIONS = "options.json"


def train_together(recipe: Recipe, launch: Launch, worker: str, **options: Any) -> dict[str, Any]:
    """Start a run's processes on this machine, and wait for them.

    Args:
        recipe: A recipe.
        launch: How many processes, and where.
        worker: The module that each of them runs, with a folder as its argument: it holds the
            recipe and the options, and takes the outcome.
        **options: Of ``train``.

    Returns:
        What ``train`` returns; nothing on other machines than the first.

    Raises:
        RecipeError: If the recipe gives one process all GPUs.
        MissingExtraError: If the recipe's strategy is not installed.
        ProcessError: What the process said that failed first.
    """
    if recipe.model.device_map is not None:
        raise RecipeError(
            "model.device_map: auto spreads the layers over all GPUs, and --devices gives each "
            "process one of them; give one of the two"
        )
    check_strategy(recipe, launch.devices * launch.nodes)
    folder = Path(tempfile.mkdtemp(prefix="vlmtune-launch-"))
    try:
        (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        (folder / OPTIONS).write_text(json.dumps(options), encoding="utf-8")
        return start(launch, worker, [str(folder)], folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
