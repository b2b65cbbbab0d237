"""Write docs/recipe.md from the configuration classes: run it after changing an option."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vlmtune.recipe import Recipe

PAGE = Path(__file__).with_name("recipe.md")
HEAD = """# Every option of a recipe

Written by `docs/generate.py` from the classes that own the options. An option is set in the YAML,
or on the command line by its dotted name: `vlmtune train latex-ocr training.batch_size=8`. A null
means the behaviour that the text describes.
"""


def page() -> str:
    """The page's text."""
    parts = [HEAD, *section("", Recipe)]
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            parts += [f"\n## {name}\n", *section(f"{name}.", field.annotation)]
    return "\n".join(parts) + "\n"


def section(prefix: str, model: type[BaseModel]) -> list[str]:
    """A table of one class's own options."""
    meanings = attributes(model)
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        default = "required" if field.is_required() else f"`{shown(field.default)}`"
        meaning = meanings[name].replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{prefix}{name}` | {default} | {meaning} |")
    return lines


def attributes(model: type[BaseModel]) -> dict[str, str]:
    """Meanings of the options from the docstring's ``Attributes``."""
    text = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", text, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", meaning) for name, meaning in found}


def shown(default: Any) -> str:
    """A default as YAML has it."""
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return "[" + ", ".join(map(str, default)) + "]"
    return str(default) if default != "" else '""'


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
