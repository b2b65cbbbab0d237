"""Which pictures are the same, and which look the same.

Same: equal pixels, upright and RGB, whatever the file. Look the same: a 256-bit difference hash
finds candidates without comparing every pair, and the pictures themselves decide. The hash alone
would not do: two formulas are mostly the same white, and differ in a few bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL.Image import Resampling

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SIDE = 16  # the hash compares neighbours on a grid of 17 x 16 cells
STEP = 2  # grey levels by which a neighbour must be lighter: paper is flat, JPEG noise is not ink
BYTES = SIDE * SIDE // 8

# On the 499,500 pairs of 1,000 formulas the hashes differ in 15 bits or more (median 70), on a
# formula and its JPEG (quality 60) in 23 or fewer; at half the size in 42.
HASH_DISTANCE = 32
SORTINGS = 16  # orders of the bits in which neighbours are looked for
NEIGHBOURS = 6  # neighbours to look at in each order

# The pictures are compared as means of squares of so many pixels: JPEG noise averages out, one
# exchanged letter does not. In the worst square, formulas differ from their JPEGs by 15 grey levels
# (quality 60) or 26 (quality 30), x^2 from x^3 by 137, or by 25 in letters of five pixels.
SQUARE = 3
MOST_DIFFERENT = 20.0
CONTRAST = 0.45  # and at most this part of the picture's own standard deviation
COMPARED_SIDE = 768  # pixels
ASPECT = 0.04  # difference of the logarithms


@dataclass(frozen=True, slots=True)
class Likeness:
    """What is kept of a picture.

    Attributes:
        pixels: Hash of the upright RGB pixels and the size.
        hash: The 256-bit difference hash.
        aspect: Logarithm of width / height.
    """

    pixels: bytes
    hash: bytes
    aspect: float


def likeness(picture: Picture) -> Likeness:
    """What is kept of an upright RGB picture."""
    digest = hashlib.blake2b(f"{picture.size}".encode(), digest_size=16)
    digest.update(picture.tobytes())
    grey = np.asarray(picture.convert("L").resize((SIDE + 1, SIDE), Resampling.BOX), dtype=np.int16)
    lighter = grey[:, 1:] > grey[:, :-1] + STEP
    width, height = picture.size
    return Likeness(
        digest.digest(), np.packbits(lighter).tobytes(), float(np.log(width) - np.log(height))
    )


def candidates(hashes: np.ndarray, aspects: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of pictures whose hashes are close, the closest first; not quadratic.

    The hashes are sorted with their bits in several orders; close ones are neighbours in some.

    Args:
        hashes: Bytes of the hashes, shape ``(pictures, 32)``, uint8.
        aspects: Logarithms of width / height, shape ``(pictures,)``.
    """
    found: set[int] = set()
    count = len(hashes)
    generator = np.random.default_rng(0)
    for _ in range(SORTINGS):
        order = _sorted(hashes, generator.permutation(SIDE * SIDE))
        for gap in range(1, min(NEIGHBOURS, count - 1) + 1):
            left, right = order[:-gap], order[gap:]
            near = np.abs(aspects[left] - aspects[right]) < ASPECT
            left, right = left[near], right[near]
            near = _distance(hashes[left], hashes[right]) <= HASH_DISTANCE
            first = np.minimum(left[near], right[near]).astype(np.int64)
            last = np.maximum(left[near], right[near])
            found.update((first * count + last).tolist())
    pairs = np.array(sorted(found), dtype=np.int64)
    first, last = pairs // max(count, 1), pairs % max(count, 1)
    closest = np.argsort(_distance(hashes[first], hashes[last]), kind="stable")
    yield from zip(first[closest].tolist(), last[closest].tolist(), strict=True)


def _sorted(hashes: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Order of the hashes with their bits in another order."""
    keys = np.empty_like(hashes)
    for start in range(0, len(hashes), 65536):  # a byte a bit: not for a million rows at once
        block = np.unpackbits(hashes[start : start + 65536], axis=1)
        keys[start : start + 65536] = np.packbits(block[:, bits], axis=1)
    return np.argsort(keys.view(f"S{BYTES}").ravel(), kind="stable")


def _distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bits in which hashes differ, shape ``(pairs,)``."""
    return np.bitwise_count(left ^ right).sum(axis=1, dtype=np.int64)


def look_alike(left: Picture, right: Picture) -> bool:
    """Whether two pictures are one, but for compression and scale."""
    size = (
        min(left.width, right.width, COMPARED_SIDE),
        min(left.height, right.height, COMPARED_SIDE),
    )
    one, other = _grey(left, size), _grey(right, size)
    limit = min(MOST_DIFFERENT, CONTRAST * float(one.std()))
    return bool(np.abs(_squares(one - other)).max() <= limit)


def _grey(picture: Picture, size: tuple[int, int]) -> np.ndarray:
    grey = picture.convert("L")
    if grey.size != size:
        grey = grey.resize(size, Resampling.BICUBIC)
    return np.asarray(grey, dtype=np.float32)


def _squares(values: np.ndarray) -> np.ndarray:
    """Means of squares of ``SQUARE`` pixels."""
    height, width = values.shape
    padded = np.pad(values, ((0, -height % SQUARE), (0, -width % SQUARE)), mode="edge")
    blocks = padded.reshape(padded.shape[0] // SQUARE, SQUARE, padded.shape[1] // SQUARE, SQUARE)
    return blocks.mean(axis=(1, 3))
