"""``vlmtune quickstart``: a model's whole life, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmtune.cli.output import Debug, Json, errors, finish, say


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("quickstart"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Render formulas, prepare, train, measure, merge and predict: the whole way, in minutes."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.cli.progress import observing
        from vlmtune.cli.train import train_lines
        from vlmtune.verbs.quickstart import NOTICE
        from vlmtune.verbs.quickstart import quickstart as run

        say(NOTICE)
        with observing() as observer:
            result = run(out, observer=observer)
        answer = result["predict"]
        lines = [
            *train_lines(result)[:-2],
            f"merged: {result['merged']}",
            f"one answer: {answer['text']!r}",
            "with your own data:",
            "  vlmtune prepare table.csv --out data/mine --validation 0.1",
            "  vlmtune train latex-ocr data.path=data/mine",
        ]
        finish(result, as_json=as_json, lines=lines)
