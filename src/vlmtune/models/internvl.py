"""InternVL 3 in transformers' own layout (Zhu et al. 2025, arXiv 2504.10479): square tiles."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vlmtune.data.boxes import from_grid, to_grid
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.models.box_syntax import on_last_image
from vlmtune.models.family import Family, FamilyFacts, Join, Piece

FACTS = FamilyFacts(
    name="internvl",
    model_types=("internvl",),
    processor_class="InternVLProcessor",
    image_processor="GotOcr2ImageProcessor",
    vision_tower="model.vision_tower",
    projector=("model.multi_modal_projector",),
    language_model=("model.language_model", "lm_head"),
    image_token="<IMG_CONTEXT>",
    end_of_turn="<|im_end|>",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    image_options=frozenset({"max_tiles"}),
    joins={"pixel_values": Join.CONCATENATE},
    packs=True,
    features="tensor",
)

GRID = 1000  # boxes are integers 0 … 1000 of width and height
BOX = re.compile(
    # A label holds no further reference: one without a box would take its neighbour's.
    r"(?:<ref>(?P<label>(?:(?!</?ref>).)*)</ref>)?"
    r"<box>\[(?P<boxes>\[[\d,\s]+\](?:,\s*\[[\d,\s]+\])*)\]</box>",
    re.DOTALL,
)
CORNERS = re.compile(r"\[(\d{1,6}),\s*(\d{1,6}),\s*(\d{1,6}),\s*(\d{1,6})\]")


class InternVL(Family):
    """The family, bound to one model's parts.

    An image is stretched to the grid of tiles nearest to its aspect; of several tiles, the whole
    stretched to one more tile follows. Tiles pass the tower side by side and never see each other.
    """

    facts = FACTS

    def settle(self, policy: ImagePolicy) -> ImagePolicy:
        """The number of tiles left open becomes the model's own."""
        policy = super().settle(policy)
        most = policy.max_tiles or int(self.parts.vision["max_patches"])
        return policy.model_copy(update={"max_tiles": most})

    def processor_arguments(self, settled: ImagePolicy) -> dict[str, Any]:
        """Tiles always: the model's processor cuts them whatever its folder says."""
        most = settled.max_tiles
        assert most is not None
        return {
            "crop_to_patches": True,
            "max_patches": most,
            "min_patches": min(most, int(self.parts.vision["min_patches"])),
        }

    def resized(self, size: Size, policy: ImagePolicy) -> Size:
        """The whole grid of tiles; the aspect is kept only as nearly as whole tiles can."""
        columns, rows = self._tiles(size, policy)
        tile = self._tile
        return Size(width=columns * tile.width, height=rows * tile.height)

    def visual_tokens(self, size: Size, policy: ImagePolicy) -> int:
        """Equally many a tile."""
        return self._views(size, policy) * self._tile_tokens

    def image_span(self, size: Size, policy: ImagePolicy) -> tuple[Piece, ...]:
        """All tiles between one pair of marks."""
        return (
            Piece("<img>", control=True),
            *super().image_span(size, policy),
            Piece("</img>", control=True),
        )

    def pictures(
        self, vision: Mapping[str, Tensor], sizes: Sequence[Size], policy: ImagePolicy
    ) -> list[np.ndarray]:
        """The tiles put together again; the small whole that follows them is left out."""
        pictures, start = [], 0
        for size in sizes:
            columns, rows = self._tiles(size, policy)
            tiles = vision["pixel_values"][start : start + columns * rows]
            # rows, columns, 3, height, width
            grid = tiles.unflatten(0, (rows, columns))
            whole = grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
            pictures.append(self.denormalised(whole))
            start += self._views(size, policy)
        return pictures

    def render_box(self, box: Box, size: Size, policy: ImagePolicy) -> list[Piece]:  # noqa: ARG002
        """``<ref>label</ref><box>[[x1, y1, x2, y2]]</box>`` in 0 … 1000 of width and height."""
        corners = to_grid(box.xyxy, size, GRID, closed=True)
        label = []
        if box.label:
            label = [
                Piece("<ref>", control=True),
                Piece(box.label),
                Piece("</ref>", control=True),
            ]
        return [
            *label,
            Piece("<box>", control=True),
            Piece(f"[{list(corners)}]"),
            Piece("</box>", control=True),
        ]

    def parse_boxes(self, text: str, sizes: Sequence[Size], policy: ImagePolicy) -> list[Box]:  # noqa: ARG002
        """All boxes of an answer, several of one label too; they lie on the latest picture."""
        if not sizes:
            return []
        boxes = []
        for match in BOX.finditer(text):
            for corners in CORNERS.findall(match["boxes"]):
                x1, y1, x2, y2 = (float(value) for value in corners)
                xyxy = from_grid((x1, y1, x2, y2), sizes[-1], GRID)
                boxes.append(on_last_image(match["label"] or "", xyxy, sizes))
        return boxes

    def _tiles(self, size: Size, policy: ImagePolicy) -> tuple[int, int]:
        """Columns and rows of tiles."""
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
            get_optimal_tiled_canvas,
        )

        limits = self.processor_arguments(self.settle(policy))
        tile = self._tile
        columns, rows = get_optimal_tiled_canvas(
            (size.height, size.width),
            (tile.height, tile.width),
            limits["min_patches"],
            limits["max_patches"],
        )
        return columns, rows

    def _views(self, size: Size, policy: ImagePolicy) -> int:
        """Tiles, and the whole where there are several."""
        columns, rows = self._tiles(size, policy)
        return columns * rows + (columns * rows > 1)

    @property
    def _tile(self) -> Size:
        own = self.parts.vision["size"]
        return Size(width=int(own["width"]), height=int(own["height"]))

    @property
    def _tile_tokens(self) -> int:
        """Visual tokens of a tile; where the folder is silent, what the processor assumes."""
        return int(self.parts.processor.get("image_seq_length", 256))
