"""``vlmtune download``: a model into a folder, for those who work that way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from vlmtune.cli.output import Debug, Json, errors, finish, say
from vlmtune.errors import UsageError

if TYPE_CHECKING:
    from vlmtune.hub import Hub


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
        from vlmtune.verbs.download import download as run

        if hub not in ("huggingface", "modelscope"):
            raise UsageError(f"--hub: found {hub!r}, expected huggingface or modelscope")
        say(f"fetching {model} from {hub}")
        result = run(model, out, hub=cast("Hub", hub), revision=revision)
        lines = [
            f"{result['path']}: {result['bytes']:,} bytes, revision {result['revision']}",
            f"next: vlmtune train RECIPE model.base={result['path']} data.path=DIR",
        ]
        finish(result, as_json=as_json, lines=lines)
