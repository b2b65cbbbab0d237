"""``vlmtune runs``: every run of a folder, in a table and on one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmtune.cli.output import Debug, Json, errors, finish

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

COLOURS = {"finished": "green", "running": "cyan", "stopped": "yellow", "damaged": "bold red"}


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Runs, or folders with runs in them."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="A page to write that compares them all.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List runs: base, data, steps, headline metric before and after, time, and how they stand."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.verbs.runs import list_runs

        result = list_runs(folders or [Path("runs")], html=html)
        if as_json:
            finish(result, as_json=True, lines=())
            return
        from rich.console import Console

        console = Console()
        for part in _shown(result):
            console.print(part)


def _shown(result: Mapping[str, Any]) -> Iterator[RenderableType]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from vlmtune.evaluation.markup import visible
    from vlmtune.evaluation.report_words import duration, metric_words

    runs = result["runs"]
    shared = {(run["base"], run["data"]) for run in runs}
    for base, data in shared if len(shared) == 1 else ():
        yield Text(visible(f"base {base}, data {data}"), "dim")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("run", overflow="fold")
    if len(shared) > 1:
        table.add_column("base, data", overflow="fold")
    table.add_column("steps", justify="right")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("before → after", no_wrap=True)
    table.add_column("state", overflow="fold")
    for run in runs:
        metric = metric_words(run["metric"]) if run["metric"] else ""
        about = Text.assemble(visible(run["base"]), "\n", (visible(run["data"]), "dim"))
        table.add_row(
            Text(visible(run["name"]), "bold"),
            *([about] if len(shared) > 1 else []),
            f"{run['steps']:,}",
            duration(run["seconds"]),
            Text.assemble((visible(metric), "dim"), " ", _claim(run), "\n", _change(run)),
            Text(visible(run["why"]), COLOURS[run["state"]]),
        )
    yield table
    if result["html"]:
        yield Text(f"page: {visible(result['html'])}")


def _change(run: Mapping[str, Any]) -> str:
    from vlmtune.evaluation.report_words import DASH, figure

    values = [
        DASH
        if each is None
        else f"{figure(each['value'])} [{figure(each['low'])}, {figure(each['high'])}]"
        for each in (run["before"], run["after"])
    ]
    return DASH if values == [DASH, DASH] else "\n→ ".join(values)


def _claim(run: Mapping[str, Any]) -> Text:
    from rich.text import Text

    if run["difference"] is None:
        return Text()
    verdict = run["difference"]["verdict"]
    colour = {"better": "green", "worse": "red"}.get(verdict, "yellow")
    return Text("no claim" if verdict == "none" else verdict, colour)
