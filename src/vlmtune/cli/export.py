"""``vlmtune export``: a prepared dataset for other tools."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmtune.cli.output import Debug, Json, errors, finish, say

if TYPE_CHECKING:
    from vlmtune.data.export import ExportResult

LOST = 3


def export(
    dataset: Annotated[Path, typer.Argument(help="A prepared dataset.")],
    out: Annotated[Path, typer.Option(help="The table (x.csv, x.json, x.jsonl), or a folder.")],
    format: Annotated[
        str,
        typer.Option(
            help="csv, tutorial-ocr, tutorial-caption, qwen, llava, sharegpt, messages, trl, swift."
        ),
    ],
    split: Annotated[str, typer.Option(help="train, validation or all.")] = "all",
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse if the form cannot hold everything.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a dataset in another tool's form. Exit 0: all of it; 3: less, and the report says what.

    The images are written beside the table as files, their bytes unchanged.
    """
    with errors(as_json=as_json, debug=debug):
        from vlmtune.cli.progress import observing
        from vlmtune.data.export import ExportRefusedError
        from vlmtune.verbs.export import export as run

        try:
            with observing() as observer:
                result = run(
                    dataset, out, format=format, split=split, strict=strict, observer=observer
                )
        except ExportRefusedError as error:
            if as_json:
                fault = {"code": error.code, "message": str(error)}
                finish({**error.result.to_json(), "error": fault}, as_json=True, lines=())
            say(f"vlmtune: {error}")
            raise typer.Exit(error.exit_status) from None
        finish(result.to_json(), as_json=as_json, lines=_lines(result))
        if result.lost:
            raise typer.Exit(LOST)


def _lines(result: ExportResult) -> list[str]:
    lines = [f"{result.path}: {result.rows:,} rows as {result.read_with['format']}"]
    if result.lost:
        codes = ", ".join(f"{code} {count}" for code, count in result.lost.items())
        left_out = f"{result.left_out:,} rows left out; " if result.left_out else ""
        lines.append(f"{left_out}not everything fits: {codes}; see {result.report}")
    options = " ".join(
        f"--{name} {shlex.quote(str(value))}" for name, value in result.read_with.items()
    )
    lines.append(f"read again with: vlmtune prepare {shlex.quote(str(result.path))} {options}")
    return lines
