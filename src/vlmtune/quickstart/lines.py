"""Printed text lines: words, numbers and code-like strings in the fonts that matplotlib brings."""

from __future__ import annotations

import functools
import random
import string
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlmtune.formulas.notation import RULES, SAID
from vlmtune.quickstart.pictures import Gray
from vlmtune.quickstart.words import ENGLISH, MORE_COMMANDS, SHAPE_WORDS

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralItalic",
    "STIXGeneralBol", "STIXGeneralBolIta",
)  # fmt: skip
_MARKS = "{}{}[]()_^\\|+-=<>/*,.;:!?'\"&%#@~$"
_LATEX = tuple(
    sorted({word for latex, _ in RULES.values() for word in latex if word != "@"} | set(SAID))
)
_SPOKEN = tuple(
    sorted({word for words in SAID.values() for word in words.split() if len(word) > 1})
)


def random_line(rng: random.Random, longest: int) -> str:
    """One line of up to ``longest`` characters, without spaces at its ends.

    Code-like lines hold the pieces of LaTeX in random order: they teach what the pieces look like
    in print, and nothing about formulas.
    """
    kind = rng.random()
    make = _words if kind < 0.35 else _code if kind < 0.8 else _numbers
    line = make(rng, rng.randint(1, longest)).strip()
    if len(line) > longest:  # parts of words are tokens of their own, which nothing else needs
        line = line[: longest + 1].rpartition(" ")[0].strip()
    return line or rng.choice(string.ascii_letters)


def line_ink(text: str, rng: random.Random, pixels: int) -> Gray:
    """The ink of a line in a random font, letters ``pixels`` high; 255 is ink."""
    font = _font(rng.choice(FONTS), pixels)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font)
    return np.asarray(image)


@functools.lru_cache(maxsize=512)
def _font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", pixels
    )


def _words(rng: random.Random, longest: int) -> str:
    line = ""
    while len(line) < longest:
        kind = rng.random()
        if kind < 0.6:
            word = rng.choice(ENGLISH)
        elif kind < 0.8:
            word = rng.choice((*_SPOKEN, *SHAPE_WORDS))
        else:
            word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 7)))
        case = rng.random()
        word = word.capitalize() if case < 0.15 else word.upper() if case < 0.2 else word
        line += word + rng.choice((" ", " ", " ", " ", ", ", ". "))
    return line


def _code(rng: random.Random, longest: int) -> str:
    line = ""
    while len(line) < longest:
        kind = rng.random()
        if kind < 0.55:
            piece = rng.choice(_LATEX)
        elif kind < 0.65:
            piece = "\\" + rng.choice(MORE_COMMANDS)
        elif kind < 0.85:
            piece = rng.choice(_MARKS)
        else:
            piece = rng.choice(string.ascii_letters + string.digits)
        glued = line and line[-1].isalpha() and piece[0].isalpha()
        line += (" " if glued or rng.random() < 0.7 else "") + piece
    return line.strip()


def _numbers(rng: random.Random, longest: int) -> str:
    line = ""
    while len(line) < longest:
        line += "".join(rng.choices(string.digits, k=rng.randint(1, 5)))
        line += rng.choice((" ", ",", ".", "-", "/", ":", " ", ") (", "),("))
    return line
