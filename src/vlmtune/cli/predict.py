"""``vlmtune predict``: one answer."""

from __future__ import annotations

from typing import Annotated

import typer

from vlmtune.cli.loading import Base, Device, DeviceMap, Dtype, MaxPixels, Quantization
from vlmtune.cli.output import Debug, Json, errors, finish


def predict(  # noqa: PLR0913
    model: Annotated[str, typer.Argument(help="Hub id, local model, run, checkpoint or adapter.")],
    image: Annotated[
        list[str] | None, typer.Option(help="Image file or URL; may be repeated.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The question; unless given, the one trained on.")
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Text before the images; unless given, the one trained on.")
    ] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Open URLs of images on the public internet.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 1024,
    max_pixels: MaxPixels = None,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    quantization: Quantization = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask a model about images, through the same preprocessing as in training."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.data.media import ImagePolicy
        from vlmtune.models.load import LoadingConfig
        from vlmtune.verbs.predict import predict as run

        result = run(
            model,
            image or [],
            prompt,
            instruction=instruction,
            max_new_tokens=max_new_tokens,
            allow_urls=allow_urls,
            image=ImagePolicy(max_pixels=max_pixels),
            base=base,
            loading=LoadingConfig(
                dtype=dtype,
                device=device,
                quantization=quantization,
                device_map=device_map,
            ),
        )
        finish(result, as_json=as_json, lines=[result["text"]])
