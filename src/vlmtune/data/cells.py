"""Cells of a CSV that a spreadsheet would run as a formula: made harmless, and back.

An apostrophe is put before such a cell, and the row says so in a column of its own, ``ESCAPED``,
that names the cells. So ``prepare`` takes off exactly the apostrophes that ``export`` put there; a
table of anybody else is never touched.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

ESCAPED = "vlmtune_escaped"

# What spreadsheets take for a formula; U+2212 is what the other forms of a minus fold to.
_STARTS = frozenset("=+-@\u2212")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def is_formula(cell: str) -> bool:
    """Whether a spreadsheet might run ``cell``; ``-1`` and ``+2.5e3`` are numbers.

    Spaces and unseen signs at the start count too, as some programs trim them, and full-width,
    small and raised forms of the signs, as some fold them.
    """
    if not cell or _NUMBER.fullmatch(cell):
        return False
    first = cell[0]
    unseen = first.isspace() or not first.isprintable()
    return unseen or unicodedata.normalize("NFKC", first)[0] in _STARTS


def neutral(cells: Mapping[str, str]) -> dict[str, str]:
    """The cells of a row with an apostrophe before each formula, and ``ESCAPED``."""
    formulas = [name for name, cell in cells.items() if is_formula(cell)]
    marked = {name: f"'{cell}" if name in formulas else cell for name, cell in cells.items()}
    return {**marked, ESCAPED: " ".join(formulas)}


def restored(cells: Mapping[str, str]) -> dict[str, str]:
    """The cells that ``neutral`` was given; a table without ``ESCAPED`` is as it is."""
    if ESCAPED not in cells:
        return dict(cells)
    formulas = cells[ESCAPED].split()
    return {
        name: cell.removeprefix("'") if name in formulas else cell
        for name, cell in cells.items()
        if name != ESCAPED
    }
