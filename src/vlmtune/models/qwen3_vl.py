"""Qwen3-VL (Qwen team 2025, arXiv 2511.21631): patches of 16, DeepStack, interleaved M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlmtune.data.boxes import to_grid
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.models import box_syntax
from vlmtune.models.family import Piece
from vlmtune.models.features import FEATURES, feature_levels
from vlmtune.models.qwen2_vl import FACTS as QWEN2_VL
from vlmtune.models.qwen2_vl import GRID, Qwen2VL

FACTS = replace(
    QWEN2_VL,
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    processor_class="Qwen3VLProcessor",
    projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
)


class Qwen3VL(Qwen2VL):
    """The family, bound to one model's parts.

    What it shares with Qwen2-VL: the image processor (with patches of 16 pixels, by its settings),
    and the positions of still images. Features of inner vision layers are added to the first layers
    of the language model at the image tokens, in the order of the images, and so a pack needs
    nothing more than a row does.
    """

    facts = FACTS

    def feature_arguments(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """With the features of inner layers, a list of images for each."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import (
            BaseModelOutputWithDeepstackFeatures,
        )

        levels: Any = [[level] for level in feature_levels(batch)]
        features: Any = [batch[FEATURES]]
        output = BaseModelOutputWithDeepstackFeatures(
            pooler_output=features, deepstack_features=levels
        )
        return {"mm_encoder_outputs": {"image": output}}

    def render_box(self, box: Box, size: Size, policy: ImagePolicy) -> list[Piece]:  # noqa: ARG002
        """``{"bbox_2d": [x1, y1, x2, y2], "label": "dog"}`` in 0 … 1000 of width and height."""
        corners = to_grid(box.xyxy, size, GRID, closed=True)
        return [Piece(box_syntax.render_json(box.label, corners))]

    def parse_boxes(self, text: str, sizes: Sequence[Size], policy: ImagePolicy) -> list[Box]:  # noqa: ARG002
        """All boxes of an answer; they lie on the latest picture."""
        return box_syntax.json_boxes(text, sizes, GRID)
