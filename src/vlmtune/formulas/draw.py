"""LaTeX into pictures.

Pictures are made by matplotlib's mathtext, which needs no TeX and knows most of what stands in one
line. Nothing here touches ``pyplot`` or matplotlib's settings.
"""

from __future__ import annotations

import csv
import re
import threading
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from PIL import Image

from vlmtune.errors import VlmtuneError
from vlmtune.formulas.grammar import formulas

Font: TypeAlias = Literal["cm", "stix", "stixsans", "dejavusans", "dejavuserif"]

# The parser keeps caches and FreeType faces that two threads must not use at once.
_LOCK = threading.Lock()
_PARSER = MathTextParser("agg")

# mathtext takes a script for one only if it stands right behind its base: 'x ^ { 2 }' draws 'x 2'.
_SCRIPT = re.compile(r"\s*(?<!\\)([_^])\s*")
# Without limits the integral sign is set so close that it strikes through what follows.
_BARE_INTEGRAL = re.compile(r"(\\i?i?int)(?![a-zA-Z_^])")


class FormulaError(VlmtuneError):
    """A formula that cannot be drawn. ``code`` is ``formula``."""

    code = "formula"


def render(
    latex: str, *, size_points: float = 14, dpi: int = 150, padding: int = 8, font: Font = "cm"
) -> Image.Image:
    r"""Draws one formula, black on white.

    Args:
        latex: The formula without ``$``, e.g. ``\frac { 1 } { 2 }``.
        size_points: Size of its letters.
        dpi: Pixels per inch.
        padding: White pixels on each side.
        font: The family of the glyphs; ``cm`` is TeX's own.

    Returns:
        A picture in mode ``L``, as large as the formula.

    Raises:
        FormulaError: The formula has a mistake, or a command that mathtext does not know.
    """
    if not latex.strip():
        raise FormulaError("An empty formula cannot be drawn; expected LaTeX such as 'x ^ { 2 }'.")
    if re.search(r"(?<!\\)(?:\\\\)*\$", latex):
        raise FormulaError(f"The formula {latex!r} contains '$'; give it without, or write '\\$'.")
    compact = _BARE_INTEGRAL.sub(r"\1\,", _SCRIPT.sub(r"\1", latex.strip()))
    prop = FontProperties(size=size_points, math_fontfamily=font)
    try:
        with _LOCK:
            parsed = _PARSER.parse(f"${compact}$", dpi=dpi, prop=prop)
    except ValueError as error:
        reason = str(error).strip().splitlines()[-1]
        raise FormulaError(f"The formula {latex!r} cannot be drawn: {reason}") from error
    ink = np.asarray(parsed.image)  # (height, width), 255 where there is ink
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if not rows.size:
        raise FormulaError(f"The formula {latex!r} draws nothing.")
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Image.fromarray(255 - np.pad(ink, padding))


def write_formula_table(folder: Path, count: int, seed: int) -> Path:
    """Writes ``images/000000.png`` … and ``formulas.csv`` (columns image, text).

    Returns:
        The path of the table.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    table = folder / "formulas.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "text"))
        for number, formula in enumerate(formulas(count, seed)):
            name = f"images/{number:06d}.png"
            render(formula).save(folder / name)
            writer.writerow((name, formula))
    return table
