"""Options that every verb that loads a model takes."""

from __future__ import annotations

from typing import Annotated

import typer

Dtype = Annotated[
    str | None, typer.Option(help="fp32, bf16 or fp16; bf16 on a GPU that has it, else fp32.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; a GPU if there is one.")]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="nf4 or int8: hold the language model in few bits; none: open what was trained over "
        "nf4 on the plain base. Unless given, as it was trained."
    ),
]
DeviceMap = Annotated[str | None, typer.Option(help="auto: spread the layers over all GPUs.")]
MaxPixels = Annotated[
    int | None,
    typer.Option(min=1, help="Image area of a plain model; what was trained keeps its own."),
]
Base = Annotated[
    str | None, typer.Option(help="Where an adapter's base is now, if it is not where it was.")
]
