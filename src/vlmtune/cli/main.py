"""``vlmtune``: the verbs in the order of a model's life, one short file each."""

from __future__ import annotations

from typing import Annotated

import typer

import vlmtune
from vlmtune.cli.chat import chat
from vlmtune.cli.check import check
from vlmtune.cli.doctor import doctor
from vlmtune.cli.download import download
from vlmtune.cli.evaluate import evaluate
from vlmtune.cli.export import export
from vlmtune.cli.inspect import inspect
from vlmtune.cli.merge import merge
from vlmtune.cli.plan import plan
from vlmtune.cli.predict import predict
from vlmtune.cli.prepare import prepare
from vlmtune.cli.quickstart import quickstart
from vlmtune.cli.recipes import recipes
from vlmtune.cli.report import report
from vlmtune.cli.reproduce import reproduce
from vlmtune.cli.runs import runs
from vlmtune.cli.serve import serve
from vlmtune.cli.train import train
from vlmtune.cli.ui import ui

app = typer.Typer(
    name="vlmtune",
    help="From image-text pairs to a fine-tuned vision-language model you can trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(prepare)
app.command()(check)
app.command()(inspect)
app.command()(export)
app.command()(plan)
app.command()(train)
app.command(name="eval")(evaluate)
app.command()(predict)
app.command()(merge)
app.command()(serve)
app.command()(ui)
app.command()(chat)
app.command()(report)
app.command()(runs)
app.command()(reproduce)
app.command()(download)
app.command()(doctor)
app.add_typer(recipes, name="recipes")
app.command()(quickstart)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"vlmtune {vlmtune.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """From image-text pairs to a fine-tuned vision-language model you can trust."""


def main() -> None:
    """The console script's entry."""
    app()
