"""``vlmtune check``: everything that can go wrong, before a GPU is busy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmtune.cli.output import Debug, Json, errors, finish, say

if TYPE_CHECKING:
    from vlmtune.checking.findings import CheckResult

FOUND, REFUSED = 3, 4


def check(  # noqa: PLR0913
    dataset: Annotated[Path, typer.Argument(help="A prepared dataset.")],
    model: Annotated[
        str | None, typer.Option(help="The model to be trained: adds token counts and its limits.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="The recipe's image.max_pixels.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="The recipe's data.max_length.")] = 8192,
    prompt: Annotated[str | None, typer.Option(help="The recipe's data.prompt.")] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODE=N",
            help="Accept so many findings of a code: 5, or 1% of the rows. More refuse.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the pictures of what was found.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at every row. Exit 0: clean; 3: notes only; 4: something to mend before training."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.checking.check_page import write_check_page
        from vlmtune.checking.findings import parse_limits
        from vlmtune.cli.progress import observing
        from vlmtune.data.media import ImagePolicy
        from vlmtune.verbs.check import check as run

        limits = parse_limits(allow or ())
        with observing() as observer:
            result = run(
                dataset,
                model,
                image=ImagePolicy(max_pixels=max_pixels),
                prompt=prompt,
                max_length=max_length,
                limits=limits,
                observer=observer,
            )
            if html is not None:
                observer.stage("writing the page")
                write_check_page(html, dataset, result, model or "")
        if html is not None:
            say(f"the page is {html}")
        finish(result.to_json(), as_json=as_json, lines=[] if as_json else [_told(dataset, result)])
        if not result.ok:
            raise typer.Exit(REFUSED)
        if result.noted:
            raise typer.Exit(FOUND)


def _told(dataset: Path, result: CheckResult) -> str:
    """The result as tables, in colour on a terminal."""
    import sys

    from rich.console import Console

    from vlmtune.cli.check_tables import tables

    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for part in tables(str(dataset), result):
            console.print(part)
    return captured.get().rstrip("\n")
