"""Formulas at random: a grammar that spends a given room of symbols."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import TypeAlias

from vlmtune.formulas.notation import (
    ACCENTS,
    ALPHABETS,
    CAPITALS,
    CONSTANTS,
    DIGITS,
    FUNCTIONS,
    GREEK,
    LETTERS,
    OPERATORS,
    RELATIONS,
    Node,
    Split,
    latex,
    split_of,
)

_COMMON_OPERATORS = ("+", "-", "+", "-", "+", "-", *OPERATORS)
_COMMON_RELATIONS = ("=", "=", "=", "=", "=", "=", *RELATIONS)
_SPECIAL = tuple(name for name in CONSTANTS if name not in (r"\prime", r"\partial"))
_SMALLEST = 2
_SCRIPTED = frozenset({"sub", "power", "sub power"})
_TALL = frozenset(
    {"fraction", "binomial", "sum", "sum over", "product", "integral", "integral over",
     "loop integral", "limit", "maximum", "minimum"}
)  # fmt: skip


def random_tree(rng: random.Random, room: int) -> Node:
    """A formula of about ``room`` symbols, none of them smaller than a script of a script."""
    while True:
        tree = _statement(rng, room)
        shrinkings = _shrinkings(tree)
        if shrinkings < _SMALLEST or (shrinkings == _SMALLEST and rng.random() < 0.5):
            return tree


def _statement(rng: random.Random, room: int) -> Node:
    if room >= 5 and rng.random() < 0.6:
        left = rng.randint(1, room - 2)
        relation = Node(rng.choice(_COMMON_RELATIONS))
        return _row(_expression(rng, left), relation, _expression(rng, room - 1 - left))
    return _expression(rng, room)


def random_formula(rng: random.Random, split: Split | None = None) -> str:
    """One formula in LaTeX, of 4 to 60 tokens, mostly about 20; of one split only, if given."""
    while True:
        formula = latex(random_tree(rng, rng.randint(7, 15)))
        if formula.count(" ") >= 3 and split in (None, split_of(formula)):
            return formula


def formulas(
    count: int, seed: int, *, exclude: Collection[str] = (), split: Split | None = None
) -> list[str]:
    """``count`` different formulas, the same for the same seed, none of them in ``exclude``.

    Args:
        count: How many.
        seed: Seed of the grammar.
        exclude: Formulas that may not come.
        split: Take the formulas of one split alone; see ``split_of``.
    """
    rng = random.Random(seed)
    excluded = frozenset(exclude)
    found: dict[str, None] = {}
    while len(found) < count:
        formula = random_formula(rng, split)
        if formula not in excluded:
            found[formula] = None
    return list(found)


def _shrinkings(node: Node) -> int:
    """How often the smallest symbol was made smaller: in fractions and scripts."""
    deepest = max(map(_shrinkings, node.parts), default=0)
    if node.rule in _SCRIPTED:
        return max(_shrinkings(node.parts[0]), 1 + max(map(_shrinkings, node.parts[1:])))
    return deepest + (node.rule in _TALL)


def _row(*parts: Node) -> Node:
    flat = [inner for part in parts for inner in (part.parts if part.rule == "row" else (part,))]
    return Node("row", tuple(flat)) if len(flat) > 1 else flat[0]


def _expression(rng: random.Random, room: int) -> Node:
    """Terms with operators between them."""
    parts: list[Node] = []
    if room >= 2 and rng.random() < 0.06:
        parts.append(Node("-"))
        room -= 1
    while room > 0:
        spend = room if room <= 2 and rng.random() < 0.7 else rng.randint(1, room)
        parts.append(_term(rng, spend))
        room -= spend
        if room >= 2 and rng.random() < 0.7:
            parts.append(Node(rng.choice(_COMMON_OPERATORS)))
            room -= 1
        elif room == 1:
            break
    return _row(*parts)


def _term(rng: random.Random, room: int) -> Node:
    if room == 1:
        return _symbol(rng)
    possible = [(build, weight) for least, build, weight in _TERMS if room >= least]
    builds, weights = zip(*possible, strict=True)
    return rng.choices(builds, weights)[0](rng, room)


def _symbol(rng: random.Random) -> Node:
    kind = rng.random()
    if kind < 0.06:
        rule = rng.choice((*ACCENTS, *ALPHABETS))
        letters = tuple("ABDEFGLMNQRT") if rule in ALPHABETS else tuple("abcdkmnpruvwxyz")
        return Node(rule, (Node(rng.choice(letters)),))
    groups = (LETTERS, CAPITALS, GREEK, DIGITS, _SPECIAL)
    return Node(rng.choice(rng.choices(groups, (0.42, 0.12, 0.22, 0.18, 0.06))[0]))


def _letter(rng: random.Random) -> Node:
    return Node(rng.choice((*LETTERS, *CAPITALS)))


def _base(rng: random.Random) -> Node:
    """What carries a script: a letter, sometimes in dress."""
    while True:
        node = _symbol(rng)
        if node.rule not in DIGITS and node.rule not in (r"\dots", r"\forall", r"\exists"):
            return node


def _two(rng: random.Random, room: int) -> tuple[int, int]:
    first = rng.randint(1, room - 1)
    return first, room - first


def _side_by_side(rng: random.Random, room: int) -> Node:
    first, second = _two(rng, room)
    return _row(_term(rng, first), _term(rng, second))


def _fraction(rng: random.Random, room: int) -> Node:
    above, below = _two(rng, room)
    return Node("fraction", (_expression(rng, above), _expression(rng, below)))


def _derivative(rng: random.Random, room: int) -> Node:
    d = Node(rng.choice((r"\partial", "d")))
    above = _row(d, _expression(rng, max(1, room - 3)))
    return Node("fraction", (above, _row(d, Node(rng.choice("txyz")))))


def _binomial(rng: random.Random, room: int) -> Node:
    above, below = _two(rng, min(room, 5))
    return Node("binomial", (_expression(rng, above), _expression(rng, below)))


def _root(rng: random.Random, room: int) -> Node:
    if room >= 3 and rng.random() < 0.25:
        return Node("degree root", (Node(rng.choice("345n")), _expression(rng, room - 1)))
    return Node("root", (_expression(rng, room),))


def _small(rng: random.Random, room: int) -> Node:
    """What stands in a script: little, and nothing tall."""
    if room == 1:
        return _symbol(rng)
    if room == 2:
        return _row(Node("-") if rng.random() < 0.5 else _symbol(rng), _symbol(rng))
    return _row(_symbol(rng), Node(rng.choice(("+", "-", ",", "="))), _symbol(rng))


def _script(rng: random.Random, room: int) -> Node:
    if rng.random() < 0.08:
        return Node("power", (_base(rng), Node(r"\prime")))
    rule = rng.choice(("sub", "power"))
    return Node(rule, (_base(rng), _small(rng, min(room - 1, 4))))


def _both_scripts(rng: random.Random, room: int) -> Node:
    first, second = _two(rng, min(room - 1, 5))
    return Node("sub power", (_base(rng), _small(rng, first), _small(rng, second)))


def _from(rng: random.Random) -> Node:
    return _row(Node(rng.choice("ijkmn")), Node("="), Node(rng.choice("0123")))


def _sum(rng: random.Random, room: int) -> Node:
    if rng.random() < 0.25:
        index = _row(Node(rng.choice("ijkmn")), Node(r"\in"), Node(rng.choice(CAPITALS)))
        return _row(Node("sum over", (index,)), _term(rng, max(1, room - 4)))
    rule = rng.choice(("sum", "sum", "product"))
    upper = Node(rng.choice(("n", "m", "N", "M", "k", r"\infty")))
    return _row(Node(rule, (_from(rng), upper)), _term(rng, max(1, room - 5)))


def _integral(rng: random.Random, room: int) -> Node:
    body = _row(_term(rng, max(1, room - 5)), Node("d"), Node(rng.choice("rstuxyz")))
    if rng.random() < 0.45:
        rule = rng.choice(("integral over", "loop integral"))
        return _row(Node(rule, (Node(rng.choice(("A", "D", "R", r"\Gamma", r"\Omega"))),)), body)
    lower, upper = (
        rng.choice(("0", "1", "a", "b", "t")),
        rng.choice(("1", "2", "b", "T", r"\infty")),
    )
    return _row(Node("integral", (Node(lower), Node(upper))), body)


def _limit(rng: random.Random, room: int) -> Node:
    if rng.random() < 0.5:
        goal = Node(rng.choice(("0", r"\infty", "a", "1")))
        under = Node("limit", (_row(Node(rng.choice("hknstx")), Node(r"\to"), goal),))
    else:
        under = Node(rng.choice(("maximum", "minimum")), (_base(rng),))
    return _row(under, _term(rng, max(1, room - 4)))


def _function(rng: random.Random, room: int) -> Node:
    name = Node(rng.choice(tuple(FUNCTIONS)))
    if room == 2 and rng.random() < 0.7:
        return _row(name, _symbol(rng))
    return _row(name, _bracket(rng, room - 1))


def _call(rng: random.Random, room: int) -> Node:
    name = Node(rng.choice("fghuvFGH"))
    if rng.random() < 0.2:
        name = Node("power", (name, Node(r"\prime")))
    return _row(name, _bracket(rng, room - 1))


def _bracket(rng: random.Random, room: int) -> Node:
    """Brackets as tall as what they hold."""
    inner = _expression(rng, room)
    return Node("big group" if _is_tall(inner) else "group", (inner,))


def _is_tall(node: Node) -> bool:
    return node.rule in _TALL or any(_is_tall(part) for part in node.parts)


def _fenced(rng: random.Random, room: int) -> Node:
    kind = rng.random()
    if kind < 0.25:
        return Node("size", (_expression(rng, room),))
    if kind < 0.4:
        return Node("square group", (_expression(rng, room),))
    if kind < 0.5 and room > 1:
        return Node("overline", (_row(_letter(rng), _expression(rng, min(room - 1, 2))),))
    group = _bracket(rng, room - 1 if room > 2 else room)
    if room > 2 and rng.random() < 0.6:
        return Node("power", (group, _small(rng, 1)))
    return group


_Build: TypeAlias = Callable[[random.Random, int], Node]
# Least room, what is built, and how often.
_TERMS: tuple[tuple[int, _Build, float], ...] = (
    (2, _script, 5), (3, _both_scripts, 1.6), (2, _side_by_side, 1.2), (2, _fraction, 3.2),
    (4, _derivative, 0.7), (2, _binomial, 0.35), (2, _root, 1.4), (5, _sum, 2.4),
    (5, _integral, 2.2), (4, _limit, 1.6), (2, _function, 1.5), (3, _call, 0.9), (2, _fenced, 1.5),
)  # fmt: skip
