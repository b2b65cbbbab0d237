"""``vlmtune eval``: any model, and other engines' predictions, on any prepared dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmtune.cli.loading import Base, Device, DeviceMap, Dtype, MaxPixels, Quantization
from vlmtune.cli.output import Debug, Json, errors, finish
from vlmtune.cli.vllm import EngineName, VllmOptions, VllmProgram, chosen_vllm


def evaluate(  # noqa: PLR0913
    data: Annotated[Path, typer.Option(help="A prepared dataset.")],
    model: Annotated[
        list[str] | None,
        typer.Argument(help="Hub ids, local models, runs, checkpoints or adapters."),
    ] = None,
    predictions: Annotated[
        list[Path] | None,
        typer.Option(help="A file of predictions to score beside the models; may be repeated."),
    ] = None,
    split: Annotated[str, typer.Option(help="Its split.")] = "validation",
    metrics: Annotated[
        str, typer.Option(help="Names of metrics; the first is the headline.")
    ] = "exact_match,edit_similarity,cer,bleu",
    normalise: Annotated[
        str, typer.Option(help="latex: bring formulas to one spelling before texts are compared.")
    ] = "none",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for predictions and report.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer; 1.5 times the longest label unless given."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals' resampling.")] = 0,
    max_pixels: MaxPixels = None,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    quantization: Quantization = None,
    device_map: DeviceMap = None,
    engine: EngineName = "own",
    vllm: VllmProgram = None,
    vllm_config: VllmOptions = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer and score a split, with intervals and a report; several models are compared."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.cli.evaluate_tables import lines
        from vlmtune.cli.progress import observing
        from vlmtune.data.media import ImagePolicy
        from vlmtune.models.load import LoadingConfig
        from vlmtune.verbs.evaluate import evaluate as run

        with observing() as observer:
            result = run(
                model or [],
                data,
                predictions=predictions or [],
                split=split,
                metrics=[name.strip() for name in metrics.split(",")],
                normalise=normalise,
                limit=limit,
                out=out,
                max_new_tokens=max_new_tokens,
                seed=seed,
                image=ImagePolicy(max_pixels=max_pixels),
                base=base,
                loading=LoadingConfig(
                    dtype=dtype,
                    device=device,
                    quantization=quantization,
                    device_map=device_map,
                ),
                vllm=chosen_vllm(engine, vllm, vllm_config),
                observer=observer,
            )
        finish(result, as_json=as_json, lines=list(lines(result)))
