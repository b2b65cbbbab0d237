"""``vlmtune chat``: talk to a model in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, TextIO

import typer

from vlmtune.cli.loading import Base, Device, DeviceMap, Dtype, MaxPixels, Quantization
from vlmtune.cli.output import Debug, Json, errors, finish, say


def chat(  # noqa: PLR0913
    model: Annotated[str, typer.Argument(help="Hub id, local model, run, checkpoint or adapter.")],
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.001, max=1, help="Draw from the likeliest tokens only.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Same seed, same answers.")
    ] = None,
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
    """Talk to a model: pictures by path, answers as they are spoken, the history kept."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.data.media import ImagePolicy
        from vlmtune.models.load import LoadingConfig
        from vlmtune.serving.settings import Settings
        from vlmtune.verbs.chat import HELP
        from vlmtune.verbs.chat import chat as run

        shown = sys.stderr if as_json else sys.stdout
        if sys.stdin.isatty():
            say(HELP.rstrip())
        result = run(
            model,
            settings=Settings(temperature=temperature, top_p=top_p, seed=seed),
            max_new_tokens=max_new_tokens,
            image=ImagePolicy(max_pixels=max_pixels),
            base=base,
            loading=LoadingConfig(
                dtype=dtype, device=device, quantization=quantization, device_map=device_map
            ),
            read=_read,
            write=lambda text: _write(shown, text),
        )
        if as_json:
            finish(result, as_json=True, lines=())


def _read() -> str:
    if not sys.stdin.isatty():
        return input()
    try:
        return input("> ")
    except KeyboardInterrupt:  # at the prompt: leave
        raise EOFError from None


def _write(shown: TextIO, text: str) -> None:
    shown.write(text)
    shown.flush()
