"""Write the pages that the code itself fills: run it after changing an option or a family."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vlmtune.models.families import FAMILIES
from vlmtune.models.family import BOX_GRID, Family
from vlmtune.recipe import Recipe
from vlmtune.testing import FAMILIES as TINY

DOCS = Path(__file__).parent
TESTS = DOCS.parent / "tests"
RECIPE = """# Every option of a recipe

Written by `docs/generate.py` from the classes that own the options. An option is set in the YAML,
or on the command line by its dotted name: `vlmtune train latex-ocr training.batch_size=8`. A null
means the behaviour that the text describes.
"""


MARKS = ("<!-- written by docs/generate.py -->", "<!-- until here -->")


def recipe_page() -> str:
    """Every option of a recipe."""
    parts = [RECIPE, *section("", Recipe)]
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
            if prefix:  # within a section; the sections themselves have tables of their own
                lines += section(f"{prefix}{name}.", field.annotation)[2:]
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


def families_page() -> str:
    """The families' page with its table: what is known of each, and what shows it."""
    text = (DOCS / "families.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return (
        "\n".join([before + MARKS[0], *families_table(), "", generic_classes(), MARKS[1]]) + after
    )


def families_table() -> list[str]:
    """A row a family; families that differ in their model types alone share one."""
    columns = ("family", "model types", "rows packed", "vision cache", "boxes", "image options")
    head = [*columns, "QLoRA", "merge", "proven by"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES:
        title, *others = family_cells(family)
        kinds = [f"`{kind}`" for kind in family.facts.model_types]
        rows.setdefault((title, *others), []).extend(kinds)
    lines = [[title, ", ".join(kinds), *others] for (title, *others), kinds in rows.items()]
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)]


def family_cells(family: type[Family]) -> list[str]:
    """A family's row of the table, its model types left out."""
    facts, module = family.facts, sys.modules[family.__module__]
    title = re.split(r": | \(", str(module.__doc__).splitlines()[0])[0].removesuffix(".")
    tiny = any(name in TINY for name in (facts.name, *facts.model_types))
    bits = "yes" if tiny and runs_for_all("tuning/test_every_family.py") else "not tested"
    suites = ["families"] if tiny and runs_for_all("families/conftest.py") else []
    suites += own_tests(family)
    boxes = f'JSON, `"bbox_2d"` in 0 … {BOX_GRID - 1} of width and height'
    if family.render_box is not Family.render_box:
        boxes = str(family.render_box.__doc__).splitlines()[0].replace("``", "`").rstrip(".")
    return [
        title,
        "yes" if facts.packs else "no",
        "no" if facts.features is None else "yes",
        boxes.replace("|", "\\|"),
        ", ".join(f"`{name}`" for name in sorted(facts.image_options)) or "none",
        bits,
        bits,
        ", ".join(f"`tests/{suite}`" for suite in suites) or "nothing yet",
    ]


def runs_for_all(path: str) -> bool:
    """Whether a test runs for every tiny model."""
    text = (TESTS / path).read_text(encoding="utf-8")
    return "from vlmtune.testing import FAMILIES" in text


def own_tests(family: type[Family]) -> list[str]:
    """Tests of what is a family's own: those named after it, or after its line, that use it."""
    facts = family.facts
    names = (facts.name, family.__module__.rsplit(".", 1)[-1])
    found = [f"models/{facts.name}"] if (TESTS / "models" / facts.name).is_dir() else []
    for path in sorted([*TESTS.glob("models/test_*.py"), *TESTS.glob("parity/test_*.py")]):
        line = path.stem.removeprefix("test_").split("_")[0]
        used = f'"{facts.model_types[0]}"' in path.read_text(encoding="utf-8")
        if path.stem.removeprefix("test_") in names or (used and names[1].startswith(line)):
            found.append(path.relative_to(TESTS).as_posix())
    return found


def generic_classes() -> str:
    """Classes without a family that the tests read."""
    text = (TESTS / "generic_models.py").read_text(encoding="utf-8")
    names = re.findall(r'^    "(\w+)": \1,$', text.partition("CLASSES")[2], re.MULTILINE)
    return f"Classes without a family that the tests read: {', '.join(f'`{n}`' for n in names)}."


PAGES: dict[str, Callable[[], str]] = {"recipe.md": recipe_page, "families.md": families_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        sys.stdout.write(f"{DOCS / name}\n")
