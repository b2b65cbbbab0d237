"""``vlmtune download``: a model into a folder, for those who work that way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmtune.cli.output import Debug, Json, errors, finish, say
from vlmtune.errors import UsageError


def download(
    model: Annotated[str, typer.Argument(help="Hub id, e.g. Qwen/Qwen2-VL-2B-Instruct.")],
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    hub: Annotated[str, typer.Option(help="huggingface or modelscope.")] = "huggingface",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a model, verified, and say which revision it is."""
    with errors(as_json=as_json, debug=debug):
        if hub not in ("huggingface", "modelscope"):
            raise UsageError(f"--hub: found {hub!r}, expected huggingface or modelscope")
        from vlmtune.hub import download_model

        say(f"fetching {model} from {hub}")
        source = "modelscope" if hub == "modelscope" else "huggingface"
        done = download_model(model, hub=source, revision=revision, out=out)  # type: ignore[arg-type]
        result = {
            "path": str(done.path),
            "revision": done.revision,
            "bytes": done.bytes,
            "sha256": done.sha256,
        }
        lines = [
            f"{done.path}: {done.bytes:,} bytes, revision {done.revision}",
            f"next: vlmtune train RECIPE model.base={done.path} data.path=DIR",
        ]
        finish(result, as_json=as_json, lines=lines)
