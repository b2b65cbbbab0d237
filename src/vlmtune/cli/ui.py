"""``vlmtune ui``: a chat page in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmtune.cli.loading import Base, Device, DeviceMap, Dtype, MaxPixels, Quantization
from vlmtune.cli.output import Debug, Json, errors, finish, say


def ui(  # noqa: PLR0913
    model: Annotated[str, typer.Argument(help="Hub id, local model, run, checkpoint or adapter.")],
    compare: Annotated[
        str | None,
        typer.Option(help="Another model that answers beside it; base: the base of an adapter."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A prepared data set: its validation rows as examples.")
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; 0.0.0.0 lets other machines in, and asks for a password."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 7860,
    password_file: Annotated[
        Path | None,
        typer.Option(help="A file whose first line is the password; else one is made up."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, unless the page says otherwise.")
    ] = 1024,
    max_images: Annotated[int, typer.Option(min=0, help="Most images of a conversation.")] = 16,
    max_pixels: MaxPixels = None,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    quantization: Quantization = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk to a model in the browser: pictures, boxes drawn on them, base beside tuned."""
    with errors(as_json=as_json, debug=debug):
        import os
        import tempfile

        from vlmtune.data.media import ImagePolicy
        from vlmtune.models.load import LoadingConfig
        from vlmtune.serving.limits import Limits
        from vlmtune.verbs.ui import UPLOADS
        from vlmtune.verbs.ui import ui as run

        def ready(url: str, password: str | None) -> None:
            told = {"url": url, **({"password": password} if password else {})}
            lines = [f"{url}; Ctrl-C ends it"]
            if password:
                lines.append(f"the password is {password} (--password-file sets your own)")
            if not as_json and host not in url:
                say(f"listening on {host}: other machines use this machine's name or address")
            finish(told, as_json=as_json, lines=lines)

        with tempfile.TemporaryDirectory(prefix="vlmtune-ui-") as folder:
            # Gradio reads these when it is imported: it would count its users, and keep uploads.
            os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
            os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, UPLOADS))
            run(
                model,
                folder=Path(folder),
                compare=compare,
                data=data,
                host=host,
                port=port,
                password_file=password_file,
                max_new_tokens=max_new_tokens,
                image=ImagePolicy(max_pixels=max_pixels),
                base=base,
                loading=LoadingConfig(
                    dtype=dtype, device=device, quantization=quantization, device_map=device_map
                ),
                limits=Limits(max_images=max_images),
                ready=ready,
            )
