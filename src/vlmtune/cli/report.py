"""``vlmtune report``: a run's report, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmtune.cli.output import Debug, Json, errors, finish


def report(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    out: Annotated[
        Path | None, typer.Option(help="A file for the report; the run's report.html unless given.")
    ] = None,
    slices: Annotated[
        list[str] | None,
        typer.Option(help="A column of the rows to slice by, as meta.KEY; may be repeated."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a run's report and model card again from what lies in its folder."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.verbs.report import report as write

        result = write(run, out=out, slices=slices or ())
        finish(result, as_json=as_json, lines=[f"report: {result['report']}"])
