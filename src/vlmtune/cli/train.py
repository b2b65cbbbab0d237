"""``vlmtune train``: evaluate before, train, evaluate after, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmtune.cli.output import Debug, Json, errors, finish
from vlmtune.garbage import without_collecting

SEVERAL = "Several devices"
WORKER = "vlmtune.cli.worker"


def train(  # noqa: PLR0913
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
    devices: Annotated[
        int, typer.Option(help="Processes on this machine, one a GPU.", rich_help_panel=SEVERAL)
    ] = 1,
    nodes: Annotated[int, typer.Option(help="Machines.", rich_help_panel=SEVERAL)] = 1,
    node_rank: Annotated[
        int, typer.Option(help="This machine among them, from 0.", rich_help_panel=SEVERAL)
    ] = 0,
    rendezvous: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of the machine of rank 0.", rich_help_panel=SEVERAL),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Record a few steps into RUN/profile/trace.json.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune as a recipe says, and measure before and after on the same rows."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.cli.progress import observing
        from vlmtune.recipe import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        from vlmtune.training.distributed.launcher import Launch

        launch = Launch(devices, nodes, node_rank, rendezvous)
        options: dict[str, Any] = {
            "run_dir": None if run is None else str(run),
            "resume": resume,
            "allow_change": allow_change,
            "profile": profile,
        }
        launch.check()
        if launch.several:
            from vlmtune.verbs.launch import train_together

            result = train_together(loaded, launch, WORKER, debug=debug, **options)
        else:
            with without_collecting():
                from vlmtune.verbs.train import train as start

            with observing(loaded.training.log_steps) as observer:
                result = start(loaded, observer=observer, **options)
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
    if (line := best_line(result)) is not None:
        lines.append(line)
    lines.append(f"report: {result['report']}")
    lines.append(f"next: vlmtune predict {result['run']} --image FILE")
    lines.append(f"      vlmtune merge {result['run']} --out models/NAME")
    return lines


def best_line(result: dict[str, Any]) -> str | None:
    """Which checkpoint was measured and is used, where that is not the newest."""
    best, chosen = result["best"] or {}, Path(result["checkpoint"])
    step = best.get("step")
    if step is None or step == result["steps"] or chosen.name != f"step-{step:06d}":
        return None
    by = ", ".join(f"{name} {value:.4g}" for name, value in best.items() if name != "step")
    return f"best: step {step} ({by}); it was evaluated, and is what predict, merge and serve use"
