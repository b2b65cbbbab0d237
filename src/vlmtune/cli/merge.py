"""``vlmtune merge``: adapter + base to plain weights, proven equal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmtune.cli.loading import Base
from vlmtune.cli.output import Debug, Json, errors, finish


def merge(  # noqa: PLR0913
    model: Annotated[str, typer.Argument(help="A run, a checkpoint or an adapter.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16; the base's own, bf16 after QLoRA.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weight file, e.g. 2048MB.")] = "5GB",
    base: Base = None,
    device: Annotated[str | None, typer.Option(help="Where to compute the proof.")] = None,
    onto: Annotated[
        str | None,
        typer.Option(help="After QLoRA: dequantised (what was trained) or original, measured."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="OWNER/NAME on a hub to send it to, after the proof.")
    ] = None,
    push_hub: Annotated[str, typer.Option(help="huggingface or modelscope.")] = "huggingface",
    private: Annotated[
        bool, typer.Option("--private", help="Let nobody else see what is pushed.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write plain weights that any engine serves, and prove that they are what was trained."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.cli.progress import observing
        from vlmtune.verbs.merge import merge as run

        with observing() as observer:
            result = run(
                model,
                out,
                dtype=dtype,
                shard_size=shard_size,
                base=base,
                device=device,
                onto=onto,
                push=push,
                push_hub=push_hub,
                private=private,
                observer=observer,
            )
        changed = ", ".join(f"{part} {count}" for part, count in result["changed"].items())
        same = "the same" if result["greedy_equal"] else "another"
        lines = [
            f"{result['path']}: tensors changed: {changed}",
            *([f"merged onto the {result['onto']} base"] if "onto" in result else []),
            f"largest logit difference {result['max_logit_difference']:.2e}, {same} greedy answer",
        ]
        if "pushed" in result:
            lines.append("pushed: {url} (revision {revision})".format(**result["pushed"]))
        finish(result, as_json=as_json, lines=lines)
