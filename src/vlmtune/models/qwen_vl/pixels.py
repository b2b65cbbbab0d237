"""Images to the pixels that the vision tower sees, the same with every version of Pillow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def pixel_values(picture: Picture, side: int) -> Tensor:
    """One image squashed to a square and normalised, shape ``(3, side, side)``, float32.

    Args:
        picture: Of any size; its aspect is given up, as in the original.
        side: ``visual.image_size``.
    """
    values = torch.from_numpy(np.array(squashed(picture.convert("RGB"), side)))
    scaled = values.permute(2, 0, 1).to(torch.float32) / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def squashed(picture: Picture, side: int) -> Picture:
    """A picture resized to a square, bicubic.

    One direction after the other, and which comes first decides a few pixels by one level. Pillow
    always began with the width; since version 13 it begins with the height where that shrinks by
    more than twice what the width shrinks. The order is written out here, that of version 13, so
    that a model trained with one version is served alike with another.
    """
    from PIL.Image import Resampling

    width, height = picture.size
    height_first = height - side > 2 * max(width - side, 0)
    between = (width, side) if height_first else (side, height)
    return picture.resize(between, Resampling.BICUBIC).resize((side, side), Resampling.BICUBIC)
