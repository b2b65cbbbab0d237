"""``vlmtune check``: everything that can go wrong, before a GPU is busy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmtune.cli.output import Debug, Json, errors, finish

FOUND, REFUSED = 3, 4
SHOWN = 20


def check(
    dataset: Annotated[Path, typer.Argument(help="A prepared dataset.")],
    model: Annotated[
        str | None, typer.Option(help="The model to be trained: adds token counts and its limits.")
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(help="The recipe's image.max_pixels.")] = None,
    max_length: Annotated[int, typer.Option(help="The recipe's data.max_length.")] = 8192,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at every row. Exit 0: clean; 3: notes only; 4: something to mend before training."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.cli.progress import observing
        from vlmtune.data.media import ImagePolicy
        from vlmtune.verbs.check import check as run

        with observing() as observer:
            result = run(
                dataset,
                model,
                image=ImagePolicy(max_pixels=max_pixels),
                max_length=max_length,
                observer=observer,
            )
        lines = [f"{dataset}: {result.rows:,} rows, " + ("ready" if result.ok else "not ready")]
        if result.tokens:
            facts = ", ".join(f"{name} {value:,}" for name, value in result.tokens.items())
            lines.append(f"tokens a row: {facts}")
        lines += [f"{code}: {count:,}" for code, count in result.counts().items()]
        for finding in result.findings[:SHOWN]:
            lines.append(f"  {finding.source} {finding.id} {finding.code}: {finding.message}")
        if len(result.findings) > SHOWN:
            lines.append(f"  … and {len(result.findings) - SHOWN:,} more (--json lists all)")
        finish(result.to_json(), as_json=as_json, lines=lines)
        if result.findings:
            raise typer.Exit(FOUND if result.ok else REFUSED)
