"""``quickstart``: the whole life offline, on rendered formulas and a tiny random model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.errors import RefusedError
from vlmtune.formulas import write_formula_table
from vlmtune.recipe import load_recipe
from vlmtune.testing import FIRST, TinySize, tiny
from vlmtune.verbs.merge import merge
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.predict import predict
from vlmtune.verbs.train import train

ROWS, VALIDATION, SEED = 800, 48, 7
NOTICE = (
    "A tiny random model learns rendered formulas: every step is real, but a base that can read is "
    "still to come, so expect the loss to fall and few formulas to come out right."
)


def quickstart(out: str | Path, *, observer: Observer | None = None) -> dict[str, Any]:
    """Render formulas, prepare them, train, measure, merge and predict.

    Args:
        out: Folder for all of it; an earlier quickstart in it is replaced.
        observer: Who is told how it goes.

    Returns:
        The keys of ``vlmtune quickstart --json``.

    Raises:
        RefusedError: If ``out`` holds something else.
    """
    observer = observer or Observer()
    folder = Path(out)
    _clear(folder)
    observer.stage("rendering formulas")
    table = write_formula_table(folder / "formulas", ROWS, SEED)
    observer.stage("preparing rows")
    prepare(table, folder / "data", PrepareOptions(validation=VALIDATION), observer.progress)
    observer.stage("making a tiny model")
    base = tiny(FIRST, folder / "base", seed=SEED, size=TinySize(hidden=96, vision_width=64))
    recipe = load_recipe(
        "quickstart", [f"model.base={base.resolve()}", f"data.path={folder / 'data'}"]
    )
    result = train(recipe, run_dir=folder / "run", observer=observer)
    merged = merge(folder / "run", folder / "model", observer=observer)
    observer.stage("asking the merged model")
    picture = sorted((folder / "formulas" / "images").iterdir())[-1]
    answer = predict(folder / "model", [picture], max_new_tokens=64)
    return {**result, "merged": merged["path"], "predict": {**answer, "image": str(picture)}}


MADE = ("formulas", "data", "base", "run", "model")


def _clear(folder: Path) -> None:
    """Remove what an earlier quickstart made, and nothing else."""
    if not folder.exists():
        folder.mkdir(parents=True)
        return
    strangers = sorted(entry.name for entry in folder.iterdir() if entry.name not in MADE)
    if strangers:
        raise RefusedError(
            f"--out: {folder} holds {', '.join(strangers[:3])}, which no quickstart made; choose "
            "another folder"
        )
    for name in MADE:
        shutil.rmtree(folder / name, ignore_errors=True)
