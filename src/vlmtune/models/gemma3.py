"""Gemma 3 (Gemma team 2025, arXiv 2503.19786): one size, images see all of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmtune.data.boxes import to_grid
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.models import box_syntax
from vlmtune.models.family import Family, FamilyFacts, Join, Piece

FACTS = FamilyFacts(
    name="gemma3",
    model_types=("gemma3",),
    processor_class="Gemma3Processor",
    image_processor="Gemma3ImageProcessor",
    vision_tower="model.vision_tower",
    projector=("model.multi_modal_projector",),
    language_model=("model.language_model", "lm_head"),
    image_token="<image_soft_token>",
    image_place="<start_of_image>",
    end_of_turn="<end_of_turn>",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    joins={"pixel_values": Join.CONCATENATE},
    packs=True,
    features="tensor",
)

GRID = 1000  # boxes are integers 0 … 1000 of height and width


class Gemma3(Family):
    """The family, bound to one model's parts.

    Every image is stretched to the one square that the tower knows; further crops of long images
    (pan and scan) are never made, as the model's processor makes none unless told to.
    """

    facts = FACTS

    def processor_arguments(self, settled: ImagePolicy) -> dict[str, Any]:  # noqa: ARG002
        """The whole image alone, whatever the folder says: as the model's processor does it."""
        return {"do_pan_and_scan": False}

    def resized(self, size: Size, policy: ImagePolicy) -> Size:  # noqa: ARG002
        """The tower's square."""
        own = self.parts.vision["size"]
        return Size(width=int(own["width"]), height=int(own["height"]))

    def visual_tokens(self, size: Size, policy: ImagePolicy) -> int:  # noqa: ARG002
        """Equally many an image: the tower's patches, averaged."""
        return int(self.parts.config.to_dict()["mm_tokens_per_image"])

    def image_span(self, size: Size, policy: ImagePolicy) -> tuple[Piece, ...]:
        """The tokens between two marks, in a paragraph of their own."""
        return (
            Piece("\n\n"),
            Piece("<start_of_image>", control=True),
            *super().image_span(size, policy),
            Piece("<end_of_image>", control=True),
            Piece("\n\n"),
        )

    def forward_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """As the plain one, with masks of our own.

        The model's own mask of sliding layers looks a packed row's image tokens up in the row
        before it; its layers take masks that are made already.
        """
        masks = attention_masks(
            batch["positions"], batch["image_mask"], self._text_config["sliding_window"]
        )
        return {**super().forward_inputs(batch), "attention_mask": masks}

    def vision_arguments(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The model makes the masks of images from the token types."""
        inputs = super().vision_arguments(batch)
        if inputs:
            inputs.update(token_types(batch))
        return inputs

    def feature_arguments(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The masks of images are made from the token types here too."""
        return {**super().feature_arguments(batch), **token_types(batch)}

    def render_box(self, box: Box, size: Size, policy: ImagePolicy) -> list[Piece]:  # noqa: ARG002
        """``{"box_2d": [y1, x1, y2, x2], "label": "dog"}`` in 0 … 1000 of height and width."""
        corners = to_grid(box.xyxy, size, GRID, closed=True)
        return [Piece(box_syntax.render_json_yx(box.label, corners))]

    def parse_boxes(self, text: str, sizes: Sequence[Size], policy: ImagePolicy) -> list[Box]:  # noqa: ARG002
        """All boxes of an answer; they lie on the latest picture."""
        return box_syntax.json_yx_boxes(text, sizes, GRID)

    @property
    def _text_config(self) -> Mapping[str, Any]:
        return self.parts.config.to_dict()["text_config"]


def token_types(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which tokens are images, as the model's forward takes it."""
    return {"token_type_ids": batch["image_mask"].to(torch.int64)}


def attention_masks(positions: Tensor, image: Tensor, window: int) -> dict[str, Tensor]:
    """Who sees whom in a pack, by kind of layer, each ``(1, 1, tokens, tokens)``, bool.

    A token sees what stands before it in its own row, and an image's tokens see all of their image;
    sliding layers see no more than ``window`` tokens back.

    Args:
        positions: ``(1, tokens)``, beginning anew with each row.
        image: True at image tokens, ``(1, tokens)``.
        window: Tokens that a sliding layer looks back.
    """
    row = (positions[0] == 0).cumsum(0)
    begins = image[0] & ~torch.nn.functional.pad(image[0], (1, 0))[:-1]
    picture = torch.where(image[0], begins.cumsum(0), 0)
    place = torch.arange(len(row), device=row.device)
    same_row = row[:, None] == row
    same_picture = (picture[:, None] == picture) & image[0]
    full = same_row & ((place[:, None] >= place) | same_picture)
    sliding = full & (place > place[:, None] - window)
    return {"full_attention": full[None, None], "sliding_attention": sliding[None, None]}
