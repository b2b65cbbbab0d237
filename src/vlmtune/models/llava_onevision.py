"""LLaVA-OneVision (Li et al. 2024, arXiv 2408.03326): SigLIP, up to 36 tiles, Qwen2.

An image alone in its row is shown in tiles, as in LLaVA-NeXT, and its features are thinned out to
those of nine tiles or so; images of a row with several are each padded to one square. Videos are
left out. The templates on the hubs write ``assistant`` and a blank before an answer's line and ask
for it without the blank: the last answer is trained as it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from vlmtune.data.media import ImagePolicy, Size
from vlmtune.models import llava_next
from vlmtune.models.family import Join
from vlmtune.models.llava import padded
from vlmtune.models.llava_next import LlavaNext

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

ANYRES = "anyres_max_"
THINNED_FROM = 1.1  # a little above the limit nothing is thinned out yet

FACTS = replace(
    llava_next.FACTS,
    name="llava_onevision",
    model_types=("llava_onevision",),
    processor_class="LlavaOnevisionProcessor",
    image_processor="LlavaOnevisionImageProcessor",
    joins={**llava_next.FACTS.joins, "batch_num_images": Join.CONCATENATE},
)


class LlavaOnevision(LlavaNext):
    """The family, bound to one model's parts."""

    facts = FACTS

    def row_policy(self, policy: ImagePolicy, images: int) -> ImagePolicy:
        """Tiles for an image alone, one square for each of several."""
        return policy.model_copy(update={"split": images == 1})

    def resized(self, size: Size, policy: ImagePolicy) -> Size:
        """The picture in its grid of tiles, or in its square, without the padding."""
        if policy.split is not False:
            return super().resized(size, policy)
        left, top, right, bottom = padded(size, self._tile)
        return Size(width=right - left, height=bottom - top)

    def visual_tokens(self, size: Size, policy: ImagePolicy) -> int:
        """As in LLaVA-NeXT; of one square, its patches and a token at their end."""
        if policy.split is not False:
            return super().visual_tokens(size, policy)
        return self._view_tokens + 1

    def image_inputs(self, images: Sequence[Picture], policy: ImagePolicy) -> dict[str, Tensor]:
        """Views ``(views, 3, side, side)``, sizes ``(images, 2)``, number of images ``(1,)``."""
        if not images:
            return {}
        # In a list of lists: images side by side would each be taken for a row of its own.
        rows: Any = [list(images)]
        arguments = self.processor_arguments(self.settle(policy))
        output = self.parts.image_processor(images=rows, return_tensors="pt", **arguments)
        found = {name: output[name] for name in self.facts.joins}
        return {**found, "pixel_values": found["pixel_values"].flatten(0, 1)}

    def pictures(
        self, vision: Mapping[str, Tensor], sizes: Sequence[Size], policy: ImagePolicy
    ) -> list[np.ndarray]:
        """The tiles put together again, or the squares, the padding cut off."""
        if self.row_policy(policy, len(sizes)).split:
            return super().pictures(vision, sizes, policy)
        pictures = []
        for size, view in zip(sizes, vision.get("pixel_values", ()), strict=True):
            left, top, right, bottom = padded(size, self._tile)
            pictures.append(self.denormalised(view[:, top:bottom, left:right]))
        return pictures

    def _features(self, size: Size) -> tuple[int, int]:
        rows, columns = super()._features(size)
        most = int(self._config["vision_aspect_ratio"].removeprefix(ANYRES))
        ratio = math.sqrt(rows * columns / (most * self._side**2))
        if ratio <= THINNED_FROM:
            return rows, columns
        return int(rows // ratio), int(columns // ratio)
