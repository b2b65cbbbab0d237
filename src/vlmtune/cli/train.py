"""``vlmtune train``: evaluate before, train, evaluate after, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmtune.cli.output import Debug, Json, errors, finish


def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (vlmtune recipes) or a .yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Options, as in training.batch_size=8.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="The run's folder; runs/NAME unless given.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run.")] = False,
    allow_change: Annotated[
        bool,
        typer.Option("--allow-change", help="Continue with changed data or options; recorded."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune as a recipe says, and measure before and after on the same rows."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.cli.progress import observing
        from vlmtune.recipe import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        from vlmtune.verbs.train import train as start

        with observing(loaded.training.log_steps) as observer:
            result = start(
                loaded, run_dir=run, resume=resume, allow_change=allow_change, observer=observer
            )
        if result:  # of several processes one speaks
            finish(result, as_json=as_json, lines=train_lines(result))


def train_lines(result: dict[str, Any]) -> list[str]:
    """A run's result for people: each metric before and after, and what to do next."""
    lines = [
        f"{result['run']}: {result['steps']} steps, {result['samples']:,} samples in "
        f"{result['seconds']:.0f} s ({result['samples_per_second']:.1f}/s)"
    ]
    for name, after in result["after"].items():
        before = result["before"].get(name)
        lines.append(
            f"  {name}: {after:.3f}" if before is None else f"  {name}: {before:.3f} → {after:.3f}"
        )
    lines.append(f"report: {result['report']}")
    lines.append(f"next: vlmtune predict {result['run']} --image FILE")
    lines.append(f"      vlmtune merge {result['run']} --out models/NAME")
    return lines
