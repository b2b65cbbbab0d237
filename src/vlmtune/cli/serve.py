"""``vlmtune serve``: an OpenAI-compatible API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vlmtune.cli.loading import Base, Device, DeviceMap, Dtype, MaxPixels, Quantization
from vlmtune.cli.output import Debug, Json, errors, finish
from vlmtune.cli.vllm import EngineName, VllmOptions, VllmProgram, chosen_vllm


def serve(  # noqa: PLR0913
    model: Annotated[str, typer.Argument(help="Hub id, local model, run, checkpoint or adapter.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; the folder's name or hub id.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH: a further adapter on the same base; may be repeated."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with one key a line; requests need one of them.")
    ] = None,
    allow_domain: Annotated[
        list[str] | None,
        typer.Option(help="Fetch images from this domain; * from any public one. Repeatable."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Let web pages of this origin ask. Repeatable.")
    ] = None,
    batch_rows: Annotated[int, typer.Option(min=1, help="Most answers spoken at once.")] = 32,
    cache_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in the caches of all running answers.")
    ] = 65_536,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Most questions that wait; further ones get status 429.")
    ] = 256,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer of requests that do not say.")
    ] = 1024,
    max_images: Annotated[int, typer.Option(min=0, help="Most images of a request.")] = 16,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest request in MiB.")] = 32,
    engine: EngineName = "own",
    vllm: VllmProgram = None,
    vllm_config: VllmOptions = None,
    max_pixels: MaxPixels = None,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    quantization: Quantization = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve a model to every client of OpenAI's API, through the preprocessing of its training."""
    with errors(as_json=as_json, debug=debug):
        import logging

        from vlmtune.data.media import ImagePolicy
        from vlmtune.models.load import LoadingConfig
        from vlmtune.serving.limits import MIB, Limits
        from vlmtune.serving.settings import EngineConfig
        from vlmtune.verbs.serve import serve as run

        logging.getLogger("vlmtune.serving").setLevel(logging.INFO)  # a line a request

        def ready(url: str, models: Sequence[str]) -> None:
            lines = [f"{', '.join(models)} at {url}/v1 (described at {url}/docs); Ctrl-C ends it"]
            finish({"url": url, "models": list(models)}, as_json=as_json, lines=lines)

        run(
            model,
            host=host,
            port=port,
            name=name,
            adapters=named_paths(adapter or []),
            api_key_file=api_key_file,
            allow_domains=allow_domain or [],
            cors_origins=cors_origin or [],
            engine=EngineConfig(
                batch_rows=batch_rows,
                cache_tokens=cache_tokens,
                max_waiting=max_waiting,
                max_new_tokens=max_new_tokens,
            ),
            limits=Limits(max_images=max_images, max_body_bytes=max_body_mb * MIB),
            image=ImagePolicy(max_pixels=max_pixels),
            base=base,
            loading=LoadingConfig(
                dtype=dtype, device=device, quantization=quantization, device_map=device_map
            ),
            vllm=chosen_vllm(engine, vllm, vllm_config),
            ready=ready,
        )


def named_paths(given: Sequence[str]) -> dict[str, str]:
    """``NAME=PATH`` texts as a table.

    Raises:
        UsageError: If one is none, or a name is given twice.
    """
    from vlmtune.errors import UsageError

    table: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--adapter: found {text!r}, expected NAME=PATH")
        if name in table:
            raise UsageError(f"--adapter: the name {name!r} is given twice")
        table[name] = path
    return table
