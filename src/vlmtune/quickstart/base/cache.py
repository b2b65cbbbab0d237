"""Rendered formulas on disk: shards of ink with both texts, written by a process of their own."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from vlmtune.formulas import Font, latex, random_tree, render, said, split_of
from vlmtune.formulas.notation import Split
from vlmtune.quickstart.pictures import Gray

ROWS = 4000  # of one shard
DPI = 100
# Pixels of an em. At first small letters make rows cheap; but what is read of formulas of 22 pixels
# is a quarter of what is read of 30, so the later shards, from LARGE on, have larger ones.
LARGE = 31
LETTERS, LARGE_LETTERS = (22, 30), (27, 36)
# The last ones are what the quickstart shows: the typeface of papers, in its size and a little off.
LAST = 60
LAST_LETTERS = (32, 36)


@dataclass(frozen=True)
class Shard:
    """One shard in memory.

    Attributes:
        ink: All pictures, one after the other, flat.
        starts: Where each begins in ``ink``.
        shapes: Height and width of each, ``(rows, 2)``.
        latex: Each formula in LaTeX.
        said: Each formula in plain words.
    """

    ink: Gray
    starts: np.ndarray
    shapes: np.ndarray
    latex: list[str]
    said: list[str]

    def picture(self, row: int) -> Gray:
        """The ink of a row, ``(height, width)``."""
        height, width = self.shapes[row]
        return self.ink[self.starts[row] : self.starts[row] + height * width].reshape(height, width)


def write_shard(folder: Path, number: int, *, split: Split, seed: int) -> Path:
    """Render one shard; the same bytes for the same number, split and seed."""
    path = folder / f"{split}-{number:05d}.npz"
    if path.exists():
        return path
    rng = random.Random(f"{seed} {split} {number}")
    inks, texts = list[Gray](), list[tuple[str, str]]()
    while len(inks) < ROWS:
        tree = random_tree(rng, rng.randint(1, 16))
        formula = latex(tree)
        if split_of(formula) != split:
            continue
        fonts: Sequence[Font] = ("cm", "cm", *get_args(Font)) if number < LAST else ("cm",)
        font = rng.choice(fonts)
        pixels = rng.uniform(*letters(number))
        picture = render(formula, size_points=pixels * 72 / DPI, dpi=DPI, padding=0, font=font)
        inks.append(255 - np.asarray(picture))
        texts.append((formula, said(tree)))
    shapes = np.array([ink.shape for ink in inks])
    starts = np.concatenate([[0], np.cumsum(shapes.prod(axis=1))[:-1]])
    temporary = path.with_suffix(f".{os.getpid()}.part")
    with temporary.open("wb") as file:
        np.savez_compressed(
            file,
            ink=np.concatenate([ink.ravel() for ink in inks]),
            starts=starts,
            shapes=shapes,
            texts=np.array(json.dumps(texts)),
        )
    temporary.rename(path)
    return path


def letters(number: int) -> tuple[float, float]:
    """The smallest and the largest em of a shard, in pixels."""
    if number >= LAST:
        return LAST_LETTERS
    return LARGE_LETTERS if number >= LARGE else LETTERS


def read_shard(path: Path) -> Shard:
    """A shard of ``write_shard``."""
    with np.load(path) as stored:
        texts = json.loads(str(stored["texts"]))
        return Shard(
            ink=stored["ink"],
            starts=stored["starts"],
            shapes=stored["shapes"],
            latex=[formula for formula, _ in texts],
            said=[words for _, words in texts],
        )
