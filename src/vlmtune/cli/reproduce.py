"""``vlmtune reproduce``: a run made again, and compared with itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmtune.cli.output import Debug, Json, errors, finish

WORDS = {
    "identical": "identical: the weights are the same to the bit",
    "equal": "equal: every answer scores the same, though the weights are not the same to the bit",
    "indistinguishable": "not identical, and no difference can be claimed",
    "different": "different: more than chance explains",
    "not measured": "not identical, and nothing was measured after training",
}


def reproduce(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Where things are now, as in data.path=DIR or model.base=DIR."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--run", help="The new run's folder; RUN-again unless given.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a reproduction that was stopped.")
    ] = False,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Go on although data or base are not the same.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run it again in a new folder, after checking versions, data and base, and compare."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.cli.progress import observing
        from vlmtune.verbs.reproduce import reproduce as again

        with observing() as observer:
            result = again(
                run,
                overrides or (),
                out=out,
                resume=resume,
                allow_change=allow_change,
                observer=observer,
            )
        if result:  # of several processes one speaks
            finish(result, as_json=as_json, lines=list(_lines(result)))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    from vlmtune.evaluation.report_words import figure

    yield f"{result['run']}: {WORDS[result['outcome']]}"
    yield from (f"  differs: {line}" for line in result["differs"])
    steps = result["steps"]
    yield f"  {steps['identical']:,} of {steps['of']:,} steps have the same loss to the bit"
    for name, found in result["metrics"].items():
        change = found["difference"]
        verdict = "no claim" if change["verdict"] == "none" else change["verdict"]
        if not change["changed"]:
            verdict = "same"
        yield (
            f"  {name}: {figure(found['first']['value'])}, again {figure(found['again']['value'])} "
            f"({verdict})"
        )
    yield f"report: {result['report']}"
