"""Idefics3 and SmolVLM (arXiv 2408.12637, 2504.05299): square tiles in rows, then the whole.

Every view is a square of one size, so that all of them pass the tower side by side and none sees
another. Marks around the views are control tokens where the vocabulary has them (SmolVLM) and plain
text where it does not (Idefics3-8B). No notation of boxes was published: the default one is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import UsageError
from vlmtune.models.family import Family, FamilyFacts, Join, Piece

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

AROUND = "<fake_token_around_image>"
WHOLE = "<global-img>"
TILE = "<row_{row}_col_{column}>"

FACTS = FamilyFacts(
    name="idefics3",
    model_types=("idefics3",),
    processor_class="Idefics3Processor",
    image_processor="Idefics3ImageProcessor",
    vision_tower="model.vision_model",
    projector=("model.connector",),
    language_model=("model.text_model", "lm_head"),
    image_token="<image>",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    image_options=frozenset({"longest_edge", "split"}),
    # The processor's mask is all ones, since no view is padded; without it the model assumes that.
    joins={"pixel_values": Join.CONCATENATE},
    packs=True,
    features="list",
)


class Idefics3(Family):
    """The family, bound to one model's parts."""

    facts = FACTS

    def settle(self, policy: ImagePolicy) -> ImagePolicy:
        """Limits left open become the model's own.

        Raises:
            UsageError: If tiles would have no names: the vocabulary knows so many rows and columns.
        """
        policy = super().settle(policy)
        own = self.parts.vision
        split = bool(own["do_image_splitting"] if policy.split is None else policy.split)
        longest = policy.longest_edge or int(own["size"]["longest_edge"])
        named = self._named_tiles
        if split and named and longest > named * self._tile:
            raise UsageError(
                f"image.longest_edge: found {longest}; the vocabulary has names for {named} "
                f"rows and columns of tiles of {self._tile} pixels. Expected at most "
                f"{named * self._tile}, or image.split=false"
            )
        return policy.model_copy(update={"longest_edge": longest, "split": split})

    def processor_arguments(self, settled: ImagePolicy) -> dict[str, Any]:
        """The longer side before tiling, and whether there are tiles."""
        return {
            "size": {"longest_edge": settled.longest_edge},
            "do_image_splitting": settled.split,
        }

    def resized(self, size: Size, policy: ImagePolicy) -> Size:
        """The whole grid of tiles; the aspect is kept only as nearly as whole tiles can."""
        rows, columns = self._grid(size, policy)
        return Size(width=columns * self._tile, height=rows * self._tile)

    def visual_tokens(self, size: Size, policy: ImagePolicy) -> int:
        """Equally many a view."""
        return self._views(size, policy) * self._view_tokens

    def image_span(self, size: Size, policy: ImagePolicy) -> tuple[Piece, ...]:
        """Each view after a mark and its name; tiles row by row, then the whole."""
        rows, columns = self._grid(size, policy)
        return tuple(self._pieces(rows, columns))

    def _pieces(self, rows: int, columns: int) -> Iterator[Piece]:
        around = Piece(AROUND, control=True)
        view = Piece(self.facts.image_token, control=True, count=self._view_tokens)
        if rows * columns > 1:
            for row in range(1, rows + 1):
                for column in range(1, columns + 1):
                    yield from (around, self._name(TILE.format(row=row, column=column)), view)
                yield Piece("\n")
            yield Piece("\n")
        yield from (around, self._name(WHOLE), view, around)

    def _processed(self, image: Picture, policy: ImagePolicy) -> dict[str, Tensor]:
        """Views ``(views, 3, side, side)``: tiles row by row, then the whole."""
        return {name: tensor[0] for name, tensor in super()._processed(image, policy).items()}

    def vision_arguments(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """All views of the batch as those of one row: ``(1, views, 3, side, side)``."""
        return {
            name: tensor.unsqueeze(0) for name, tensor in super().vision_arguments(batch).items()
        }

    def pictures(
        self, vision: Mapping[str, Tensor], sizes: Sequence[Size], policy: ImagePolicy
    ) -> list[np.ndarray]:
        """The tiles put together again; the small whole that follows them is left out."""
        pictures, start = [], 0
        for size in sizes:
            rows, columns = self._grid(size, policy)
            tiles = vision["pixel_values"][start : start + rows * columns]
            # rows, columns, 3, height, width
            grid = tiles.unflatten(0, (rows, columns))
            whole = grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
            pictures.append(self.denormalised(whole))
            start += self._views(size, policy)
        return pictures

    def _grid(self, size: Size, policy: ImagePolicy) -> tuple[int, int]:
        """Rows and columns of tiles; one of each where the whole is all that is shown."""
        from transformers.models.idefics3.image_processing_pil_idefics3 import (
            get_resize_output_image_size,
        )

        settled = self.settle(policy)
        longest = settled.longest_edge
        assert longest is not None
        if not settled.split:
            return 1, 1
        # Only its shape is looked at: a picture of one byte, repeated.
        shape = np.broadcast_to(np.uint8(0), (1, size.height, size.width))
        height, width = get_resize_output_image_size(shape, longest)
        aspect, side = width / height, self._tile
        # What header-only counting in transformers itself gets wrong: the longer side grows to
        # whole tiles first, and the shorter one with it.
        if width >= height:
            columns = math.ceil(width / side)
            return math.ceil(int(columns * side / aspect) / side), columns
        rows = math.ceil(height / side)
        return rows, math.ceil(int(rows * side * aspect) / side)

    def _views(self, size: Size, policy: ImagePolicy) -> int:
        """Tiles, and the whole where there are several."""
        rows, columns = self._grid(size, policy)
        return rows * columns + (rows * columns > 1)

    def _name(self, mark: str) -> Piece:
        return Piece(mark, control=mark in self._marks)

    @cached_property
    def _named_tiles(self) -> int:
        """Rows and columns of tiles that the vocabulary has names for; 0 where names are text."""
        known = (TILE.format(row=n, column=n) in self._marks for n in itertools.count(1))
        return sum(1 for _ in itertools.takewhile(bool, known))

    @cached_property
    def _marks(self) -> frozenset[str]:
        """The vocabulary's control tokens."""
        return frozenset(self.parts.tokenizer.get_added_vocab())

    @cached_property
    def _tile(self) -> int:
        """Side of a view in pixels."""
        return int(self.parts.vision["max_image_size"]["longest_edge"])

    @cached_property
    def _view_tokens(self) -> int:
        """Visual tokens of a view: patches, of which squares become one token each."""
        side = self._tile // int(self._config["vision_config"]["patch_size"])
        return side * side // int(self._config["scale_factor"]) ** 2

    @cached_property
    def _config(self) -> dict[str, Any]:
        return self.parts.config.to_dict()


class SmolVLM(Idefics3):
    """The same under another name; its processor's part for videos is left out."""

    facts = replace(
        FACTS,
        name="smolvlm",
        model_types=("smolvlm",),
        processor_class="SmolVLMProcessor",
        image_processor="SmolVLMImageProcessor",
    )
