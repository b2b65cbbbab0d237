r"""Formulas as trees, and the ways to write one: LaTeX and plain words.

Both are read off the same tree by the same table, so that they say the same thing in the same
order: ``\frac { a _ { 1 } } { b }`` is ``fraction a sub 1 end over b end``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, TypeAlias

Split: TypeAlias = Literal["pretraining", "training", "held_out"]

LETTERS = tuple("abcdefghijkmnpqrstuvwxyz")
# Capitals that are not merely large small letters.
CAPITALS = tuple("ABDEFGHLMNQRTY")
DIGITS = tuple("0123456789")
GREEK = (
    r"\alpha", r"\beta", r"\gamma", r"\delta", r"\epsilon", r"\zeta", r"\eta", r"\theta",
    r"\lambda", r"\mu", r"\xi", r"\pi", r"\rho", r"\sigma", r"\tau", r"\phi", r"\psi", r"\omega",
    r"\Gamma", r"\Delta", r"\Theta", r"\Lambda", r"\Phi", r"\Psi", r"\Omega",
)  # fmt: skip
FUNCTIONS = {
    r"\sin": "sine", r"\cos": "cosine", r"\tan": "tangent", r"\ln": "natural log", r"\log": "log",
    r"\exp": "exp", r"\cosh": "hyperbolic cosine", r"\sinh": "hyperbolic sine",
    r"\det": "determinant", r"\arg": "argument", r"\dim": "dimension", r"\ker": "kernel",
}  # fmt: skip
OPERATORS = {
    "+": "plus", "-": "minus", r"\cdot": "dot", r"\times": "times", r"\pm": "plus or minus",
    r"\div": "divided by", r"\otimes": "tensor", r"\oplus": "direct plus", r"\cup": "union",
    r"\cap": "meet", r"\wedge": "and", r"\vee": "or", r"\circ": "after", ",": "comma",
    "/": "slash", r"\ast": "star",
}  # fmt: skip
RELATIONS = {
    "=": "equals", "<": "less than", ">": "greater than", r"\leq": "at most", r"\geq": "at least",
    r"\neq": "not equal", r"\approx": "about", r"\equiv": "same as", r"\sim": "like",
    r"\propto": "proportional", r"\in": "in", r"\subset": "inside", r"\to": "goes to",
    r"\Rightarrow": "implies", r"\mapsto": "maps to", r"\perp": "perpendicular",
    r"\ll": "far below", r"\gg": "far above",
}  # fmt: skip
CONSTANTS = {
    r"\infty": "infinity", r"\nabla": "nabla", r"\hbar": "h bar", r"\ell": "ell",
    r"\partial": "partial", r"\emptyset": "empty set", r"\dots": "dots", r"\prime": "prime",
    r"\forall": "for all", r"\exists": "exists",
}  # fmt: skip
ACCENTS = {
    r"\hat": "hat", r"\bar": "bar", r"\tilde": "tilde", r"\vec": "arrow", r"\dot": "one dot",
    r"\ddot": "two dots",
}  # fmt: skip
ALPHABETS = {r"\mathbf": "bold", r"\mathcal": "curly", r"\mathbb": "double"}

# Rule: how it is written in LaTeX, and how it is said; each @ is the next part.
_RULES = {
    "fraction": (r"\frac { @ } { @ }", "fraction @ over @ end"),
    "binomial": (r"\binom { @ } { @ }", "choose @ over @ end"),
    "root": (r"\sqrt { @ }", "root @ end"),
    "degree root": (r"\sqrt [ @ ] { @ }", "degree @ root @ end"),
    "sub": ("@ _ { @ }", "@ sub @ end"),
    "power": ("@ ^ { @ }", "@ power @ end"),
    "sub power": ("@ _ { @ } ^ { @ }", "@ sub @ power @ end"),
    "sum": (r"\sum _ { @ } ^ { @ }", "sum from @ to @ end"),
    "sum over": (r"\sum _ { @ }", "sum over @ end"),
    "product": (r"\prod _ { @ } ^ { @ }", "product from @ to @ end"),
    "integral": (r"\int _ { @ } ^ { @ }", "integral from @ to @ end"),
    "integral over": (r"\int _ { @ }", "integral over @ end"),
    "loop integral": (r"\oint _ { @ }", "loop integral over @ end"),
    "limit": (r"\lim _ { @ }", "limit as @ end"),
    "maximum": (r"\max _ { @ }", "maximum over @ end"),
    "minimum": (r"\min _ { @ }", "minimum over @ end"),
    "group": ("( @ )", "open @ close"),
    "big group": (r"\left( @ \right)", "big open @ close"),
    "square group": (r"\left[ @ \right]", "square open @ close"),
    "size": (r"\left| @ \right|", "size of @ end"),
    "overline": (r"\overline { @ }", "line above @ end"),
    **{command: (f"{command} {{ @ }}", f"{word} @ end") for command, word in ACCENTS.items()},
    **{command: (f"{command} {{ @ }}", f"{word} @ end") for command, word in ALPHABETS.items()},
}
RULES = {name: (latex.split(), said.split()) for name, (latex, said) in _RULES.items()}
_CAPITAL_GREEK = "big"
SAID = {
    **{symbol: symbol for symbol in (*LETTERS, *CAPITALS, *DIGITS)},
    **{name: name[1:] for name in GREEK if name[1].islower()},
    **{name: f"{_CAPITAL_GREEK} {name[1:].lower()}" for name in GREEK if name[1].isupper()},
    **FUNCTIONS, **OPERATORS, **RELATIONS, **CONSTANTS,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Node:
    """A part of a formula.

    Attributes:
        rule: A symbol in LaTeX, a key of ``RULES``, or ``row`` for parts side by side.
        parts: What it is made of; nothing in a symbol.
    """

    rule: str
    parts: tuple[Node, ...] = ()


def latex(node: Node) -> str:
    r"""The formula in LaTeX, its tokens separated by spaces as in the public OCR data."""
    return " ".join(_write(node, 0))


def said(node: Node) -> str:
    """The formula in plain words."""
    return " ".join(_write(node, 1))


def symbols(node: Node) -> int:
    """Number of symbols, a measure of size that does not count braces."""
    return sum(symbols(part) for part in node.parts) if node.parts else 1


def split_of(formula: str) -> Split:
    """Which split a formula belongs to, whatever the spaces: 85, 10 and 5 of a hundred.

    It depends on nothing but the formula, so that no two splits can share one.
    """
    digest = hashlib.sha256("".join(formula.split()).encode()).digest()
    place = int.from_bytes(digest[:4], "big") % 100
    return "held_out" if place < 5 else "training" if place < 15 else "pretraining"


def _write(node: Node, language: int) -> list[str]:
    if node.rule == "row":
        return [word for part in node.parts for word in _write(part, language)]
    if not node.parts:
        return [node.rule] if language == 0 else [SAID[node.rule]]
    parts = iter(node.parts)
    words: list[str] = []
    for word in RULES[node.rule][language]:
        words += _write(next(parts), language) if word == "@" else [word]
    return words
