"""``vlmtune prepare``: raw rows to a prepared dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmtune.cli.output import Debug, Json, errors, finish
from vlmtune.errors import UsageError

QUARANTINED = 3


def prepare(  # noqa: PLR0913
    source: Annotated[
        str,
        typer.Argument(
            help="A table, a folder, a pattern ('rows/*.jsonl'), tar shards, or a hub's owner/name."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the dataset to make.")],
    format: Annotated[str, typer.Option(help="Form of the source; auto finds out.")] = "auto",
    prompt: Annotated[str | None, typer.Option(help="Question of rows that have none.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Names of columns: image=picture,text=latex.")
    ] = None,
    validation: Annotated[str, typer.Option(help="Rows to set apart: 64, or 0.1 of them.")] = "0",
    split_by: Annotated[str, typer.Option(help="last, random or column:NAME.")] = "last",
    max_bad: Annotated[
        float, typer.Option(help="Bad rows to put up with: a part below 1, else a number.")
    ] = 0.01,
    limit: Annotated[int | None, typer.Option(help="Only the first rows.")] = None,
    images_root: Annotated[
        Path | None, typer.Option(help="Another folder that images may lie in.")
    ] = None,
    answer_separator: Annotated[
        str | None, typer.Option(help="Splits a cell that holds several answers, e.g. '&&'.")
    ] = None,
    hub: Annotated[str, typer.Option(help="huggingface or modelscope.")] = "huggingface",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub data set.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub data set.")] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of a hub data set.")] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Open URLs of images on the public internet.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes; unless given one a core, at most 4.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn raw rows into a prepared dataset; bad rows are quarantined, with their reason."""
    with errors(as_json=as_json, debug=debug):
        from pydantic import ValidationError

        from vlmtune.cli.progress import observing
        from vlmtune.data.prepare import PrepareOptions, PrepareRefusedError
        from vlmtune.data.prepare import prepare as run

        try:
            options = PrepareOptions.model_validate(
                {
                    "format": format,
                    "prompt": prompt,
                    "columns": _columns(columns),
                    "validation": _number(validation),
                    "split_by": split_by,
                    "max_bad": max_bad,
                    "limit": limit,
                    "images_root": str(images_root) if images_root else None,
                    "answer_separator": answer_separator,
                    "hub": hub,
                    "revision": revision,
                    "split": split,
                    "subset": subset,
                    "allow_urls": allow_urls,
                    "workers": workers,
                    "seed": seed,
                }
            )
        except ValidationError as error:
            faults = [
                f"--{'.'.join(map(str, fault['loc'])).replace('_', '-')}: {fault['msg']}"
                for fault in error.errors()
            ]
            raise UsageError("; ".join(faults)) from error
        try:
            with observing() as observer:
                observer.stage(f"preparing {source}")
                result = run(source, out, options, observer.progress)
        except PrepareRefusedError as error:
            if as_json:
                fault = {"code": error.code, "message": str(error)}
                finish({**error.result.to_json(), "error": fault}, as_json=True, lines=())
            typer.echo(f"vlmtune: {error}", err=True)
            raise typer.Exit(error.exit_status) from None
        rows, splits = result.rows, result.splits
        lines = [
            f"{result.path}: {rows.kept:,} of {rows.came_in:,} rows kept "
            f"({splits['train']:,} train, {splits['validation']:,} validation)"
        ]
        lines += [str(result.detection), *result.detection.notes, *result.notes]
        if result.already_made:
            lines[0] += "; it was there already and is the same"
        if rows.quarantined:
            codes = ", ".join(f"{code} {count}" for code, count in result.quarantine.items())
            lines.append(f"{rows.quarantined} quarantined: {codes}; see {out}/quarantine.jsonl")
        finish(result.to_json(), as_json=as_json, lines=lines)
        if rows.quarantined:
            raise typer.Exit(QUARANTINED)


def _columns(text: str | None) -> dict[str, str]:
    if text is None:
        return {}
    pairs = [pair.partition("=") for pair in text.split(",")]
    if any(not equals or not name.strip() or not column for name, equals, column in pairs):
        raise UsageError(f"--columns: found {text!r}, expected image=NAME,text=NAME")
    return {name.strip(): column.strip() for name, _, column in pairs}


def _number(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise UsageError(
            f"--validation: found {text!r}, expected a number of rows (64) or a part (0.1)"
        ) from None
