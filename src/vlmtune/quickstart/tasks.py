"""The quickstart's tasks: what is drawn, what is asked, what has to be answered."""

from __future__ import annotations

import gc
import itertools
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmtune.errors import UsageError
from vlmtune.formulas import formulas, render
from vlmtune.formulas.notation import Split
from vlmtune.quickstart.pictures import placed
from vlmtune.quickstart.shapes import draw_scene, random_scene

LETTER, DPI = 34, 100  # pixels of an em, pixels of an inch
FORMULA_SEED = 11
Picture = Image.Image
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A thing to learn.

    Attributes:
        recipe: Name of the shipped recipe that learns it.
        draw: Pictures and their conversations, the same for the same arguments: rows, and whether
            they are the held-out ones.
        rows: How many pictures to train on.
    """

    recipe: str
    draw: Callable[[int, bool], Iterator[tuple[Picture, dict[str, Any]]]]
    rows: int = 1500


def _formulas(count: int, held_out: bool) -> Iterator[tuple[Picture, dict[str, Any]]]:
    split: Split = "held_out" if held_out else "training"
    for formula in formulas(count, FORMULA_SEED, split=split):
        size = LETTER * 72 / DPI
        ink = 255 - np.asarray(render(formula, size_points=size, dpi=DPI, padding=0, font="cm"))
        yield Image.fromarray(255 - placed(ink)), _answered(FORMULA_PROMPT, formula)


def _shapes(count: int, held_out: bool) -> Iterator[tuple[Picture, dict[str, Any]]]:
    rng = random.Random(f"shapes {held_out}")
    for _ in range(count):
        scene = random_scene(rng, 1)
        yield Image.fromarray(draw_scene(scene)), _answered(SHAPE_PROMPT, scene.shapes[0].kind)


def _boxes(count: int, held_out: bool) -> Iterator[tuple[Picture, dict[str, Any]]]:
    rng = random.Random(f"boxes {held_out}")
    for _ in range(count):
        scene = random_scene(rng, 2)
        shape = rng.choice(scene.shapes)
        question = f"Where is the {shape.kind}?"
        bbox = [float(side) for side in shape.box]
        yield (
            Image.fromarray(draw_scene(scene)),
            {
                "messages": [
                    {"role": "user", "content": f"<image>{question}"},
                    {"role": "assistant", "content": "<ref-object><bbox>"},
                ],
                "objects": {"ref": [shape.kind], "bbox": [bbox]},
            },
        )


def _answered(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"<image>{question}"},
            {"role": "assistant", "content": answer},
        ]
    }


FORMULA_PROMPT = "Write this formula in LaTeX."
SHAPE_PROMPT = "Which shape is this?"
TASKS = {
    "formulas": Task(recipe="quickstart", draw=_formulas),
    "shapes": Task(recipe="quickstart-shapes", draw=_shapes),
    "boxes": Task(recipe="quickstart-boxes", draw=_boxes, rows=4500),
}


def task(name: str) -> Task:
    """A task by name.

    Raises:
        UsageError: If there is none of that name.
    """
    if name not in TASKS:
        raise UsageError(f"--task: found {name!r}, expected one of {', '.join(TASKS)}")
    return TASKS[name]


def write_task(
    folder: Path,
    name: str,
    rows: int,
    held_out: int,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write ``images/000000.png`` … and ``rows.jsonl``, the held-out rows last.

    Args:
        folder: Where to.
        name: A key of ``TASKS``.
        rows: How many to train on.
        held_out: How many to measure on; they hold no formula of training or of the base's
            pretraining.
        progress: Called with the number of pictures drawn and of all.

    Returns:
        The path of the table.
    """
    draw = task(name).draw
    (folder / "images").mkdir(parents=True, exist_ok=True)
    table = folder / "rows.jsonl"
    with _uncollected(), table.open("w", encoding="utf-8") as file:
        drawn = itertools.chain(draw(rows, False), draw(held_out, True))
        for number, (picture, row) in enumerate(drawn):
            image = f"images/{number:06d}.png"
            picture.save(folder / image)
            file.write(json.dumps({**row, "images": [image]}) + "\n")
            if progress is not None:
                progress(number + 1, rows + held_out)
    return table


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector from what exists now.

    Reading formulas makes so many objects that it would go through all of torch's again and again.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
