"""``vlmtune plan``: memory, tokens, time, before starting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from vlmtune.cli.output import Debug, Json, errors, finish

DOES_NOT_FIT = 4


def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (vlmtune recipes) or a .yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Options, as in training.batch_size=8.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="h200, a100, l4, … by name; here: this machine's, measured now.")
    ] = "here",
    devices: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    mfu: Annotated[
        float, typer.Option(min=0.001, max=1, help="Part of the device's best that is reached.")
    ] = 0.4,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Forecast memory, tokens, FLOPs and time of a run. Exit 4: it does not fit on the device."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.cli.progress import observing
        from vlmtune.recipe import load_recipe
        from vlmtune.verbs.plan import plan as forecast

        loaded = load_recipe(recipe, overrides or [])
        with observing() as observer:
            result = forecast(loaded, device=device, devices=devices, mfu=mfu, observer=observer)
        finish(result, as_json=as_json, lines=[] if as_json else list(_told(result)))
        if not result["fits"]:
            raise typer.Exit(DOES_NOT_FIT)


def _told(result: dict[str, Any]) -> Iterator[str]:
    """The forecast for people."""
    from vlmtune.evaluation.report_words import duration
    from vlmtune.verbs.doctor import size

    parts = ", ".join(
        f"{name} {_count(part['parameters'])}"
        + (f" ({_count(part['trainable'])} train)" if part["trainable"] else "")
        for name, part in result["parts"].items()
    )
    yield f"parameters: {parts}"
    rows = result["rows"]
    yield (
        f"data: {rows['trained']:,} rows ({rows['left_out']:,} left out), {result['steps']:,} "
        f"steps, {_count(result['tokens'])} tokens, {result['forwards_per_step']:.1f} forwards a "
        f"step of at most {result['token_budget']:,} tokens"
    )
    device, time = result["device"], result["time"]
    count = f"{result['devices']} × " if result["devices"] > 1 else ""
    how = "measured here" if device["measured"] else "data sheet"
    strategy = f", {result['strategy']}" if result["strategy"] else ""
    yield f"memory of {count}{device['name']}{strategy}: {size(result['peak_memory_bytes'])}"
    for name, held in result["memory"].items():
        yield f"  {name}: {size(held)}"
    if (found := result["recomputed"])["peaks"]:
        peaks = ", ".join(f"{part} {size(peak)}" for part, peak in found["peaks"].items())
        yield f"computed again: {found['recomputed']}; the peak by what is: {peaks}"
    seen = result["vision_cache"]
    if seen["once"]:
        times = seen["sightings"] / seen["images"]
        yield (
            f"images: {seen['images']:,}, each looked at once, not {times:.1f} times; "
            f"{size(seen['feature_bytes'])} of features"
        )
    elif result["longest"]["pixels"]["pixels"]:
        yield f"images: looked at in every epoch: {seen['why_not']}"
    yield (
        f"time: {duration(result['seconds'])}, {time['samples_per_second']:.1f} samples/s; "
        f"{result['flops']:.3g} FLOPs at {time['mfu_assumed']:.0%} of "
        f"{device['flops_per_second'] / 1e12:,.1f} TFLOP/s ({how})"
    )
    if result["fits"]:
        yield f"fits: {size(device['room_bytes'])} are there for it"
        return
    yield f"does not fit: {size(device['room_bytes'])} are there for it. Change one of these:"
    for change in result["advice"]:
        verdict = "fits" if change["fits"] else "not enough alone"
        yield f"  {change['change']}: {size(change['peak_memory_bytes'])}, {verdict}"


def _count(number: float) -> str:
    """A count for people: 1.31 B, 73.9 M."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f}"
