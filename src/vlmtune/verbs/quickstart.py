"""``quickstart``: a model's whole life offline, on the built-in base and drawn pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.errors import RefusedError
from vlmtune.models.builtin import BUILTIN
from vlmtune.quickstart.tasks import task as task_of
from vlmtune.quickstart.tasks import write_task
from vlmtune.recipe import load_recipe
from vlmtune.verbs.merge import merge
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.predict import predict
from vlmtune.verbs.train import train

HELD_OUT = 200
MOST_TOKENS = 96  # of the one answer
MADE = ("pictures", "data", "run", "model")


def quickstart(
    out: str | Path | None = None,
    *,
    task: str = "formulas",
    base: str = BUILTIN,
    rows: int | None = None,
    held_out: int = HELD_OUT,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Draw pictures, prepare them, train, measure, merge and predict.

    Args:
        out: Folder for all of it; an earlier quickstart in it is replaced. None:
            ``quickstart/TASK``.
        task: ``formulas`` (to LaTeX), ``shapes`` (which is it?) or ``boxes`` (where is it?).
        base: MODEL to start from.
        rows: Pictures to train on; None: as many as the task takes.
        held_out: Pictures to measure on.
        observer: Who is told how it goes.

    Returns:
        The keys of ``vlmtune quickstart --json``.

    Raises:
        RefusedError: If ``out`` holds something else.
        UsageError: If there is no such task.
    """
    observer = observer or Observer()
    recipe_name, rows = task_of(task).recipe, rows or task_of(task).rows
    folder = Path(out) if out is not None else Path("quickstart") / task
    _clear(folder)
    observer.stage("drawing pictures")
    table = write_task(folder / "pictures", task, rows, held_out, observer.progress)
    observer.stage("preparing rows")
    prepare(table, folder / "data", PrepareOptions(validation=held_out), observer.progress)
    recipe = load_recipe(recipe_name, [f"model.base={base}", f"data.path={folder / 'data'}"])
    result = train(recipe, run_dir=folder / "run", observer=observer)
    merged = merge(folder / "run", folder / "model", observer=observer)
    observer.stage("asking the merged model")
    asked = _held_out_row(table)
    answer = predict(
        folder / "model", [asked["image"]], asked["question"], max_new_tokens=MOST_TOKENS
    )
    return {
        **result,
        "task": task,
        "recipe": recipe_name,
        "merged": merged["path"],
        "predict": {**asked, **answer},
    }


def _held_out_row(table: Path) -> dict[str, Any]:
    """The last picture of the table, what is asked of it, and what has to be answered."""
    row = json.loads(table.read_text(encoding="utf-8").splitlines()[-1])
    question, answer = (message["content"] for message in row["messages"])
    return {
        "image": str(table.parent / row["images"][0]),
        "question": question.removeprefix("<image>"),
        "expected": row["objects"]["bbox"] if "objects" in row else answer,
    }


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
