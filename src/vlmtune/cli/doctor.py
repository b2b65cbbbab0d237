"""``vlmtune doctor``: whether this machine can do the work, on one screen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmtune.cli.output import Debug, Json, errors, finish

MARKS = {"ok": ("✓", "green"), "note": ("!", "yellow"), "fault": ("✗", "bold red")}


def doctor(
    folder: Annotated[Path, typer.Option("--out", help="Where runs will be written.")] = Path(
        "runs"
    ),
    network: Annotated[
        bool, typer.Option("--network", help="Ask the hubs for an answer, 3 s at most each.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at this machine: versions, GPUs, precision, memory, disk. Exit 1 if something fails."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.verbs.doctor import doctor as look

        result = look(folder, network=network)
        finish(result, as_json=as_json, lines=[] if as_json else [_told(result)])
        if not result["ok"]:
            raise typer.Exit(1)


def _told(result: dict[str, Any]) -> str:
    """The findings as a table, in colour on a terminal."""
    import sys

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in result["findings"]:
        mark, colour = MARKS[finding["state"]]
        words = Text(finding["found"])
        if finding["advice"]:
            words.append(f"\n→ {finding['advice']}", "dim")
        table.add_row(Text(mark, colour), Text(finding["name"], "bold"), words)
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")
