"""LaTeX into pictures, and formulas to draw: the data of the quickstart.

Pictures are made by matplotlib's mathtext, which needs no TeX and knows most of what stands in one
line. Nothing here touches ``pyplot`` or matplotlib's settings.
"""

from __future__ import annotations

import csv
import random
import re
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from PIL import Image

from vlmtune.errors import VlmtuneError

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


# Formulas to draw --------------------------------------------------------------------------------
# Tokens are separated by spaces, as in the public LaTeX OCR data: \frac { 1 } { 2 }

_LETTERS = ("a", "b", "c", "k", "m", "n", "p", "t", "u", "v", "x", "y", "z", "A", "B", "M", "N")
_GREEK = (
    r"\alpha", r"\beta", r"\gamma", r"\delta", r"\epsilon", r"\theta", r"\lambda", r"\mu", r"\pi",
    r"\rho", r"\sigma", r"\phi", r"\psi", r"\omega", r"\Gamma", r"\Delta", r"\Omega", r"\Phi",
)  # fmt: skip
_DIGITS = tuple("123456789")
_FUNCTIONS = (r"\sin", r"\cos", r"\tan", r"\ln", r"\log", r"\exp", r"\cosh", r"\sinh")
_RELATIONS = ("=", "=", "=", r"\leq", r"\geq", "<", ">", r"\neq", r"\approx", r"\equiv")
_OPERATORS = ("+", "-", "+", "-", r"\cdot", r"\times", r"\pm")
_ACCENTS = (r"\hat", r"\bar", r"\tilde", r"\vec", r"\dot")


def random_formula(rng: random.Random) -> str:
    """One formula that ``render`` can draw, of 3 to some 100 tokens."""
    while True:
        formula = _expression(rng, depth=rng.choice((1, 1, 2)))
        if rng.random() < 0.55:
            formula += f" {rng.choice(_RELATIONS)} {_expression(rng, depth=1)}"
        if formula.count(" ") >= 2:
            return formula


def formulas(count: int, seed: int, *, exclude: Collection[str] = ()) -> list[str]:
    """``count`` different formulas, the same for the same seed, none of them in ``exclude``."""
    rng = random.Random(seed)
    excluded = frozenset(exclude)
    found: dict[str, None] = {}
    while len(found) < count:
        formula = random_formula(rng)
        if formula not in excluded:
            found[formula] = None
    return list(found)


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


def _expression(rng: random.Random, depth: int) -> str:
    terms = [_term(rng, depth)]
    while rng.random() < 0.4 and len(terms) < 3:
        terms += [rng.choice(_OPERATORS), _term(rng, depth)]
    return " ".join(terms)


def _term(rng: random.Random, depth: int) -> str:
    """A small thing, or (while ``depth`` lasts) one that holds expressions."""
    if depth == 0:
        return _scripted(rng)
    (build,) = rng.choices(_TERMS, weights=_WEIGHTS)
    return build(rng, depth - 1)


def _symbol(rng: random.Random) -> str:
    return rng.choice(rng.choices((_LETTERS, _GREEK, _DIGITS), weights=(5, 3, 2))[0])


def _small(rng: random.Random) -> str:
    """What stands in an index: one symbol, or two with an operator."""
    if rng.random() < 0.7:
        return _symbol(rng)
    return f"{rng.choice(_LETTERS)} {rng.choice('+-')} {rng.choice(_DIGITS)}"


def _scripted(rng: random.Random, _depth: int = 0) -> str:
    symbol, kind = _symbol(rng), rng.random()
    if kind < 0.35 or symbol in _DIGITS:
        return symbol
    if kind < 0.6:
        return f"{symbol} _ {{ {_small(rng)} }}"
    if kind < 0.85:
        return f"{symbol} ^ {{ {_small(rng)} }}"
    return f"{symbol} _ {{ {_small(rng)} }} ^ {{ {_small(rng)} }}"


def _fraction(rng: random.Random, depth: int) -> str:
    return f"\\frac {{ {_expression(rng, depth)} }} {{ {_expression(rng, depth)} }}"


def _root(rng: random.Random, depth: int) -> str:
    degree = f"[ {rng.choice('345n')} ] " if rng.random() < 0.2 else ""
    return f"\\sqrt {degree}{{ {_expression(rng, depth)} }}"


def _sum(rng: random.Random, depth: int) -> str:
    index, sign = rng.choice("ijkn"), rng.choice((r"\sum", r"\sum", r"\prod"))
    start, end = rng.choice("01"), rng.choice(("n", "N", "m", r"\infty"))
    return f"{sign} _ {{ {index} = {start} }} ^ {{ {end} }} {_term(rng, depth)}"


def _integral(rng: random.Random, depth: int) -> str:
    variable = rng.choice("xtyuz")
    limits = f"_ {{ {rng.choice('01ab')} }} ^ {{ {rng.choice(('1', 'T', chr(92) + 'infty'))} }} "
    return f"\\int {limits if rng.random() < 0.7 else ''}{_term(rng, depth)} d {variable}"


def _function(rng: random.Random, depth: int) -> str:
    return f"{rng.choice(_FUNCTIONS)} ( {_expression(rng, depth)} )"


def _call(rng: random.Random, depth: int) -> str:
    prime = r" ^ { \prime }" if rng.random() < 0.3 else ""
    return f"{rng.choice('fghFG')}{prime} ( {_expression(rng, depth)} )"


def _bracket(rng: random.Random, depth: int) -> str:
    power = f" ^ {{ {_small(rng)} }}" if rng.random() < 0.6 else ""
    return f"\\left( {_expression(rng, depth)} \\right){power}"


def _derivative(rng: random.Random, _depth: int) -> str:
    d = rng.choice((r"\partial", "d"))
    return f"\\frac {{ {d} {rng.choice('fuyS')} }} {{ {d} {rng.choice('xtz')} }}"


def _accent(rng: random.Random, _depth: int) -> str:
    return f"{rng.choice(_ACCENTS)} {{ {rng.choice(_LETTERS)} }}"


_Build: TypeAlias = Callable[[random.Random, int], str]
_CHANCES: dict[_Build, float] = {
    _scripted: 8, _fraction: 3, _root: 1.5, _sum: 1, _integral: 1, _function: 2, _call: 1.5,
    _bracket: 1.5, _derivative: 1, _accent: 0.7,
}  # fmt: skip
_TERMS, _WEIGHTS = tuple(_CHANCES), tuple(_CHANCES.values())
