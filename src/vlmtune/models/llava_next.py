"""LLaVA-NeXT, also called LLaVA 1.6 (Liu et al. 2024): tiles at any aspect, padding taken out.

An image is scaled into that grid of tiles, of those the model knows, which fits it best, and padded
in it. The language model sees the whole, squeezed into one tile, then the features of the grid row
by row, without those of padding and with a learned one at the end of each row: how many they are
depends on the size alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ModelError
from vlmtune.models.family import FamilyFacts, Join, Parts
from vlmtune.models.llava import LlavaLine

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

FACTS = FamilyFacts(
    name="llava_next",
    model_types=("llava_next",),
    processor_class="LlavaNextProcessor",
    image_processor="LlavaNextImageProcessor",
    vision_tower="model.vision_tower",
    projector=("model.multi_modal_projector", "model.image_newline"),
    language_model=("model.language_model", "lm_head"),
    image_token="<image>",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    joins={"pixel_values": Join.CONCATENATE, "image_sizes": Join.CONCATENATE},
    packs=True,
    features="list",
)


class LlavaNext(LlavaLine):
    """The family, bound to one model's parts.

    It has no image options: the model counts an image's tiles from its size and its own
    configuration, so that a processor set otherwise would not match it.
    """

    facts = FACTS

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        ours, theirs = parts.vision["image_grid_pinpoints"], self._config["image_grid_pinpoints"]
        if [list(grid) for grid in ours] != [list(grid) for grid in theirs]:
            raise ModelError(
                "image_grid_pinpoints of the image processor's configuration and of config.json "
                f"differ: {ours} and {theirs}. The model would take an image apart in another way "
                "than it was put together; use one list in both"
            )

    def resized(self, size: Size, policy: ImagePolicy) -> Size:  # noqa: ARG002
        """The picture as it lies in its grid of tiles, without the padding."""
        from transformers.image_processing_utils import get_patch_output_size
        from transformers.image_utils import ChannelDimension

        # Only its shape is looked at: a picture of one byte, repeated.
        shape = np.broadcast_to(np.uint8(0), (3, size.height, size.width))
        height, width = get_patch_output_size(shape, self._canvas(size), ChannelDimension.FIRST)
        return Size(width=width, height=height)

    def visual_tokens(self, size: Size, policy: ImagePolicy) -> int:  # noqa: ARG002
        """The whole, then the rows of the grid, each with a token at its end."""
        rows, columns = self._features(size)
        return self._view_tokens + rows * (columns + 1)

    def _processed(self, image: Picture, policy: ImagePolicy) -> dict[str, Tensor]:
        """Views ``(views, 3, side, side)``, the whole first; size ``(1, 2)``, height and width."""
        found = super()._processed(image, policy)
        return {**found, "pixel_values": found["pixel_values"].flatten(0, 1)}

    def pictures(
        self, vision: Mapping[str, Tensor], sizes: Sequence[Size], policy: ImagePolicy
    ) -> list[np.ndarray]:
        """The tiles put together again, the padding cut off."""
        pictures, start = [], 0
        for size in sizes:
            height, width = self._canvas(size)
            rows, columns = height // self._tile, width // self._tile
            tiles = vision["pixel_values"][start + 1 : start + 1 + rows * columns]
            # rows, columns, 3, height, width
            grid = tiles.unflatten(0, (rows, columns))
            whole = grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
            resized = self.resized(size, policy)
            top, left = (height - resized.height) // 2, (width - resized.width) // 2
            picture = whole[:, top : top + resized.height, left : left + resized.width]
            pictures.append(self.denormalised(picture))
            start += 1 + rows * columns
        return pictures

    def _canvas(self, size: Size) -> tuple[int, int]:
        """Height and width in pixels of the grid of tiles that fits an image best."""
        from transformers.image_processing_utils import select_best_resolution

        pinpoints = self._config["image_grid_pinpoints"]
        best: Any = select_best_resolution((size.height, size.width), pinpoints)
        height, width = best
        return height, width

    def _features(self, size: Size) -> tuple[int, int]:
        """Rows and columns of the grid's features that are left without those of padding."""
        height, width = self._canvas(size)
        rows = self._side * (height // self._tile)
        columns = self._side * (width // self._tile)
        # The model rounds to seven decimals first: 671.9999999999999 is 672.
        if size.width / size.height > columns / rows:
            inner = int(round(size.height * (columns / size.width), 7))
            return rows - (rows - inner) // 2 * 2, columns
        inner = int(round(size.width * (rows / size.height), 7))
        return rows, columns - (columns - inner) // 2 * 2

    @property
    def _tile(self) -> int:
        """Side of a tile in pixels, as the model has it."""
        return int(self._config["vision_config"]["image_size"])
