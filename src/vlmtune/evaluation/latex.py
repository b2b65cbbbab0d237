"""LaTeX brought to one spelling, so that a formula is not wrong for being written otherwise.

Only what cannot change the printed formula (or changes spacing and weight alone) is undone: blanks,
spacing commands, sizes of delimiters, fonts, optional braces, synonyms. Structure is never touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

Normalise = Literal["none", "latex"]  # how texts are brought to one spelling before comparison

TOKEN = re.compile(r"\\[A-Za-z]+\*?|\\.|\S", re.DOTALL)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SPACING = _words(
    r"\, \; \: \! \> ~ \quad \qquad \enspace \thinspace \medspace \thickspace \hfill \null"
) | {"\\ "}
SIZES = _words(
    r"\left \right \middle \big \Big \bigg \Bigg \bigl \bigr \bigm \Bigl \Bigr \Bigm \biggl \biggr"
    r" \Biggl \Biggr \displaystyle \textstyle \scriptstyle \scriptscriptstyle \normalsize \small"
    r" \large \Large \limits \nolimits"
)
# Calligraphic, blackboard and Fraktur letters are other letters, and stay.
FONTS = _words(
    r"\rm \bf \it \sf \tt \mit \boldmath \mathrm \mathbf \mathit \mathsf \mathtt \mathnormal"
    r" \boldsymbol \bm \text \textrm \textbf \textit \textup \mbox \hbox \operatorname"
    r" \operatorname* \mathop \mathord \mathbin \mathrel \mathopen \mathclose"
)
# Switches to such letters reach to the end of their group: ``{ \cal L }`` is ``\mathcal { L }``.
SWITCHES = {
    r"\cal": r"\mathcal",
    r"\frak": r"\mathfrak",
    r"\Bbb": r"\mathbb",
    r"\scr": r"\mathscr",
}
FUNCTIONS = _words(
    r"\sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \sinh \cosh \tanh \coth \log \ln \lg"
    r" \exp \lim \max \min \sup \inf \det \dim \ker \deg \gcd \arg \hom \Pr"
)
SYNONYMS = {
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\cfrac": r"\frac",
    r"\dbinom": r"\binom",
    r"\tbinom": r"\binom",
    r"\leq": r"\le",
    r"\geq": r"\ge",
    r"\neq": r"\ne",
    r"\rightarrow": r"\to",
    r"\leftarrow": r"\gets",
    r"\land": r"\wedge",
    r"\lor": r"\vee",
    r"\lnot": r"\neg",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\lbrack": "[",
    r"\rbrack": "]",
    r"\lvert": "|",
    r"\rvert": "|",
    r"\vert": "|",
    r"\mid": "|",
    r"\Vert": r"\|",
    r"\lVert": r"\|",
    r"\rVert": r"\|",
    r"\parallel": r"\|",
    r"\ldots": r"\dots",
    r"\dotsc": r"\dots",
    r"\dotsb": r"\dots",
    r"\ast": "*",
    r"\colon": ":",
    r"\lt": "<",
    r"\gt": ">",
    r"\hdots": r"\dots",
    r"\owns": r"\ni",
    r"\dag": r"\dagger",
    r"\ddag": r"\ddagger",
}
PRIMES = re.compile(r"'(?:\s*')*")  # short for a superscript of primes
DROPPED = SPACING | SIZES | FONTS | {"$"}


def normalise_latex(text: str) -> str:
    r"""One spelling of a formula: ``\left( \dfrac {1} 2 \right)`` becomes ``( \frac 1 2 )``.

    Idempotent; tokens come out separated by single blanks. A text that is not balanced is only cut
    into tokens and cleared of what is dropped.
    """
    tokens: list[str] = []
    ends: list[list[str]] = []  # what closes each open group
    for token in TOKEN.findall(PRIMES.sub(_primes, text)):
        if token in FUNCTIONS:  # as ``\operatorname { s i n }``, letter by letter
            tokens += token[1:]
        elif token in SWITCHES and tokens and tokens[-1] == "{":
            tokens += [SWITCHES[token], "{"]
            ends[-1] = ["}", "}"]
        elif token == "}":
            tokens += ends.pop() if ends else [token]
        elif token not in DROPPED:
            tokens.append(SYNONYMS.get(token, token))
            ends += [["}"]] * (token == "{")
    while (fewer := list(_without_idle_braces(tokens))) != tokens:
        tokens = fewer
    return " ".join(tokens)


def _primes(found: re.Match[str]) -> str:
    return " ^ { " + r"\prime " * found.group().count("'") + "} "


def _without_idle_braces(tokens: list[str]) -> Iterator[str]:
    """Leave out braces around one token, and those that group nothing for a command or a script."""
    pairs = _pairs(tokens)
    idle: set[int] = set()
    for start, end in sorted(pairs.items(), key=lambda pair: pair[1] - pair[0]):
        content = [place for place in range(start + 1, end) if place not in idle]
        if len(content) == 1 or not _is_argument(tokens, start, idle):
            idle |= {start, end}
    for place, token in enumerate(tokens):
        if place not in idle:
            yield token


def _pairs(tokens: list[str]) -> dict[int, int]:
    """Place of each opening brace -> place of its closing one; nothing where they do not match."""
    pairs: dict[int, int] = {}
    waiting: list[int] = []
    for place, token in enumerate(tokens):
        if token == "{":
            waiting.append(place)
        elif token == "}":
            if not waiting:
                return {}
            pairs[waiting.pop()] = place
    return {} if waiting else pairs


def _is_argument(tokens: list[str], start: int, idle: set[int]) -> bool:
    """Whether a group may belong to the command, script or group before it; if in doubt, yes."""
    before = start - 1
    while before >= 0 and before in idle:
        before -= 1
    if before < 0:
        return False
    token = tokens[before]
    return token in ("^", "_", "}", "]") or (token.startswith("\\") and token[1:2].isalpha())
