"""``vlmtune quickstart``: a model's whole life, offline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from vlmtune.cli.output import Debug, Json, errors, finish


def quickstart(
    task: Annotated[
        str, typer.Option(help="What to learn: formulas, shapes or boxes.")
    ] = "formulas",
    out: Annotated[
        Path | None, typer.Option(help="Folder for everything it makes; quickstart/TASK.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw pictures, train the built-in base on them, measure, merge and predict: in minutes."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.cli.progress import observing
        from vlmtune.cli.train import train_lines
        from vlmtune.verbs.quickstart import quickstart as run

        with observing() as observer:
            result = run(out, task=task, observer=observer)
        lines = [*train_lines(result)[:-2], *_next_lines(result)]
        finish(result, as_json=as_json, lines=lines)


def _next_lines(result: dict[str, Any]) -> Iterator[str]:
    """What it said about one picture, and how to go on."""
    answer, model = result["predict"], quote(result["merged"])
    boxes = [[round(side) for side in box["xyxy"]] for box in answer["boxes"]]
    yield f"merged, and proven equal: {result['merged']}"
    yield f"{answer['image']}: {answer['question']}"
    yield f"  said:     {boxes or answer['text']}"
    yield f"  expected: {answer['expected']}"
    yield "ask it yourself:"
    yield (
        f"  vlmtune predict {model} --image {quote(answer['image'])} "
        f"--prompt {quote(answer['question'])}"
    )
    yield f"  vlmtune ui {model}"
    yield "with data of your own, on the built-in base and on a real one:"
    yield "  vlmtune prepare table.csv --out data/mine --validation 0.1"
    yield f"  vlmtune train {result['recipe']} data.path=data/mine --run runs/mine"
    yield "  vlmtune train latex-ocr data.path=data/mine   # Qwen2-VL-2B; see vlmtune recipes"
