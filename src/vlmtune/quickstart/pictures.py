"""From ink to a picture that looks used: size, weight, contrast, blur, noise, place on the page."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 28  # pixels of one visual token; whole tokens need no resizing in the processor
Gray = NDArray[np.uint8]
Page = NDArray[np.float32]


def worn(ink: Gray, rng: random.Random, noise: np.random.Generator) -> Gray:
    """A page with the ink on it, in whole tokens.

    Args:
        ink: ``(height, width)``, 255 where there is ink.
        rng: Decides what happens to it.
        noise: Makes the noise.

    Returns:
        ``(height, width)``, both multiples of ``SIDE``, dark on light.
    """
    if rng.random() < 0.5:
        ink = _resized(ink, rng)
    page: Page = placed(ink, rng, margin=rng.choice((1, 2, 3, 5))).astype(np.float32)
    page /= 255
    weight = rng.random()
    if weight < 0.15:
        page = np.maximum(page, np.float32(rng.uniform(0.3, 1.0)) * _spread(page))
    elif weight < 0.3:
        page = page ** np.float32(rng.uniform(1.0, 1.6))
    if rng.random() < 0.25:
        page = _blurred(page, rng.uniform(0.1, 0.5))
    light = rng.uniform(200, 255) if rng.random() < 0.4 else 255.0
    dark = rng.uniform(0, 110) if rng.random() < 0.4 else 0.0
    page = np.float32(light) + np.float32(dark - light) * page
    if rng.random() < 0.3:
        page += np.float32(rng.uniform(2, 14)) * noise.standard_normal(page.shape, dtype=np.float32)
    return np.clip(page, 0, 255).astype(np.uint8)


def placed(ink: Gray, rng: random.Random | None = None, *, margin: int = 2) -> Gray:
    """Ink on a field of whole tokens: in the middle, or anywhere if ``rng`` is given."""
    height, width = (-(-(side + 2 * margin) // SIDE) * SIDE for side in ink.shape)
    room = height - ink.shape[0] - 2 * margin, width - ink.shape[1] - 2 * margin
    top, left = (margin + (rng.randint(0, free) if rng else free // 2) for free in room)
    field = np.zeros((height, width), dtype=np.uint8)
    field[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return field


def _resized(ink: Gray, rng: random.Random) -> Gray:
    scale, stretch = rng.uniform(0.8, 1.2), rng.uniform(0.95, 1.05)
    width = max(1, round(ink.shape[1] * scale * stretch))
    height = max(1, round(ink.shape[0] * scale / stretch))
    resized = Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _spread(page: Page) -> Page:
    """Each pixel the darkest of itself and its right and lower neighbours."""
    out = page.copy()
    out[:, :-1] = np.maximum(out[:, :-1], page[:, 1:])
    out[:-1] = np.maximum(out[:-1], page[1:])
    return out


def _blurred(page: Page, amount: float) -> Page:
    share = np.float32(amount)
    for axis in (0, 1):
        around = np.roll(page, 1, axis) + np.roll(page, -1, axis)
        page = (1 - share) * page + share / 2 * around
    return page
