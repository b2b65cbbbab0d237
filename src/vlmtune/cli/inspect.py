"""``vlmtune inspect``: what the model sees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmtune.cli.loading import MaxPixels
from vlmtune.cli.output import Debug, Json, errors, finish, say

if TYPE_CHECKING:
    from vlmtune.checking.inspect import SeenRow

STYLES = {
    "template": "dim",
    "question": "blue",
    "answer": "green",
    "control": "magenta",
    "image": "cyan",
}


def inspect(  # noqa: PLR0913
    dataset: Annotated[Path, typer.Argument(help="A prepared dataset.")],
    model: Annotated[str, typer.Option(help="Hub id, local model, run, checkpoint or adapter.")],
    rows: Annotated[int, typer.Option(min=1, help="The first so many rows.")] = 3,
    ids: Annotated[list[str] | None, typer.Option(help="A row's id; may be repeated.")] = None,
    split: Annotated[str, typer.Option(help="Their split.")] = "train",
    html: Annotated[Path | None, typer.Option(help="A page to write.")] = None,
    max_pixels: MaxPixels = None,
    prompt: Annotated[
        str | None, typer.Option(help="The recipe's data.prompt, for a plain model.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show rows as the model sees them: every token by kind and by the loss mask, every picture."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.cli.progress import observing
        from vlmtune.data.media import ImagePolicy
        from vlmtune.verbs.inspect import inspect as run

        with observing() as observer:
            seen = run(
                dataset,
                model,
                rows=rows,
                ids=ids or (),
                split=split,
                html=html,
                image=ImagePolicy(max_pixels=max_pixels),
                prompt=prompt,
                observer=observer,
            )
        if html is not None:
            say(f"the page is {html}")
        if as_json:
            finish({"rows": [row.to_json() for row in seen]}, as_json=True, lines=())
        else:
            _show(seen)


def _show(rows: list[SeenRow]) -> None:
    from rich.console import Console
    from rich.text import Text

    from vlmtune.evaluation.markup import visible

    console = Console()
    legend = Text("colours: ")
    for kind, style in STYLES.items():
        legend.append(f" {kind} ", style)
    legend.append("  underlined: the loss counts it", "underline")
    console.print(legend)
    for row in rows:
        console.rule(visible(f"{row.id}  ({row.place}, {len(row.input_ids):,} tokens)"))
        for image in row.images:
            console.print(
                f"image {image.size.width} x {image.size.height} -> {image.resized.width} x "
                f"{image.resized.height} pixels, {image.tokens:,} tokens",
                style="cyan",
            )
        text = Text()
        for stretch in row.stretches:
            shown = (
                f"[{stretch.tokens:,} image tokens]" if stretch.kind == "image" else stretch.text
            )
            style = STYLES[stretch.kind] + (" underline" if stretch.trained else "")
            text.append(visible(shown), style)
        console.print(text)
