"""``vlmtune eval``: any model on any prepared dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmtune.cli.loading import Base, Device, DeviceMap, Dtype, MaxPixels, Quantization
from vlmtune.cli.output import Debug, Json, errors, finish


def evaluate(  # noqa: PLR0913
    model: Annotated[str, typer.Argument(help="Hub id, local model, run, checkpoint or adapter.")],
    data: Annotated[Path, typer.Option(help="A prepared dataset.")],
    split: Annotated[str, typer.Option(help="Its split.")] = "validation",
    metrics: Annotated[
        str, typer.Option(help="Names of metrics; the first is the headline.")
    ] = "exact_match,edit_similarity,cer,bleu",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for predictions and report.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer; 1.5 times the longest label unless given."),
    ] = None,
    max_pixels: MaxPixels = None,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    quantization: Quantization = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer and score a split, with intervals and a report."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.cli.progress import observing
        from vlmtune.data.media import ImagePolicy
        from vlmtune.models.load import LoadingConfig
        from vlmtune.verbs.evaluate import evaluate as run

        with observing() as observer:
            result = run(
                model,
                data,
                split=split,
                metrics=[name.strip() for name in metrics.split(",")],
                limit=limit,
                out=out,
                max_new_tokens=max_new_tokens,
                image=ImagePolicy(max_pixels=max_pixels),
                base=base,
                loading=LoadingConfig(
                    dtype=dtype,
                    device=device,
                    quantization=quantization,
                    device_map=device_map,
                ),
                observer=observer,
            )
        lines = [
            f"{name}: {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
            for name, value in result["metrics"].items()
        ]
        lines += [f"{result['samples']:,} rows", f"report: {result['report']}"]
        finish(result, as_json=as_json, lines=lines)
