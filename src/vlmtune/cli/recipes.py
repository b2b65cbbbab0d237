"""``vlmtune recipes``: list, show and copy the shipped recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmtune.cli.output import Debug, Json, errors, finish
from vlmtune.errors import RefusedError

recipes = typer.Typer(help="List, show or copy the shipped recipes.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name of a shipped recipe.")]


@recipes.command("list")
def list_recipes(as_json: Json = False, debug: Debug = False) -> None:
    """Names and one line each."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.recipe import load_recipe, shipped_recipes

        found = {name: load_recipe(name).description for name in shipped_recipes()}
        lines = [f"{name}: {description}" for name, description in found.items()]
        finish({"recipes": found}, as_json=as_json, lines=lines)


@recipes.command()
def show(name: Name, as_json: Json = False, debug: Debug = False) -> None:
    """A recipe with every default written out."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.recipe import load_recipe

        recipe = load_recipe(name)
        finish(recipe.model_dump(mode="json"), as_json=as_json, lines=[recipe.to_yaml().rstrip()])


@recipes.command()
def copy(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The .yaml to write.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a shipped recipe into a file of one's own, comments included."""
    with errors(as_json=as_json, debug=debug):
        from vlmtune.recipe import load_recipe, shipped_recipes

        load_recipe(name)
        if file.exists():
            raise RefusedError(f"{file} exists; choose another name")
        file.write_text(shipped_recipes()[name], encoding="utf-8")
        finish({"path": str(file)}, as_json=as_json, lines=[f"{file}: a copy of {name}"])
