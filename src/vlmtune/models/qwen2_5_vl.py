"""Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923): window attention, boxes in absolute pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlmtune.data.boxes import to_grid
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.models import box_syntax
from vlmtune.models.family import Piece
from vlmtune.models.qwen2_vl import FACTS as QWEN2_VL
from vlmtune.models.qwen2_vl import Qwen2VL

FACTS = replace(
    QWEN2_VL,
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    processor_class="Qwen2_5_VLProcessor",
    former_image_processors=("Qwen2_5_VLImageProcessor",),
)


class Qwen25VL(Qwen2VL):
    """The family, bound to one model's parts.

    What it shares with Qwen2-VL: image processor, sizes, template, and the positions of still
    images (only a video's time is scaled). Its windows end at the edge of an image, and so packed
    rows stay apart in the tower too.
    """

    facts = FACTS

    def render_box(self, box: Box, size: Size, policy: ImagePolicy) -> list[Piece]:
        """``{"bbox_2d": [x1, y1, x2, y2], "label": "dog"}`` in pixels of the resized image."""
        corners = to_grid(box.xyxy, size, self.resized(size, policy))
        return [Piece(box_syntax.render_json(box.label, corners))]

    def parse_boxes(self, text: str, sizes: Sequence[Size], policy: ImagePolicy) -> list[Box]:
        """All boxes of an answer; they lie on the latest picture."""
        if not sizes:
            return []
        return box_syntax.json_boxes(text, sizes, self.resized(sizes[-1], policy))
