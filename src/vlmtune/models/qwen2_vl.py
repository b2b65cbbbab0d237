"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191): native resolution, M-RoPE, ChatML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlmtune.data.boxes import from_grid, to_grid
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ImageError
from vlmtune.models.family import Family, FamilyFacts, Join, Piece, Tokens

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

FACTS = FamilyFacts(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    processor_class="Qwen2VLProcessor",
    image_processor="Qwen2VLImageProcessor",
    vision_tower="model.visual",
    projector=("model.visual.merger",),
    language_model=("model.language_model", "lm_head"),
    image_token="<|image_pad|>",
    end_of_turn="<|im_end|>",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    image_options=frozenset({"max_pixels", "min_pixels", "size"}),
    joins={"pixel_values": Join.CONCATENATE, "image_grid_thw": Join.CONCATENATE},
    packs=True,
    segments=True,
    features="list",
)

GRID = 1000  # boxes are integers 0 … 999 of width and height
BOX = re.compile(
    # A label holds no further reference: one without a box would take its neighbour's.
    r"(?:<\|object_ref_start\|>(?P<label>(?:(?!<\|object_ref_).)*)<\|object_ref_end\|>)?"
    r"<\|box_start\|>\((\d{1,6}),\s*(\d{1,6})\),\s*\((\d{1,6}),\s*(\d{1,6})\)<\|box_end\|>",
    re.DOTALL,
)


class Qwen2VL(Family):
    """The family, bound to one model's parts."""

    facts = FACTS

    def settle(self, policy: ImagePolicy) -> ImagePolicy:
        """Limits left open become the model's own; a fixed size is rounded to whole tokens."""
        policy = super().settle(policy)
        if policy.size is not None:
            height, width = (
                max(1, round(side / self._token)) * self._token for side in policy.size
            )
            return policy.model_copy(update={"size": (height, width)})
        own = self.parts.vision["size"]
        highest = policy.max_pixels or max(own["longest_edge"], policy.min_pixels or 0)
        lowest = policy.min_pixels or min(own["shortest_edge"], highest)
        return policy.model_copy(update={"max_pixels": highest, "min_pixels": lowest})

    def resized(self, size: Size, policy: ImagePolicy) -> Size:
        """Whole tokens a side, nearest to the aspect within the policy's area."""
        settled = self.settle(policy)
        if settled.size is not None:
            return Size(width=settled.size[1], height=settled.size[0])
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        assert settled.min_pixels is not None
        assert settled.max_pixels is not None
        try:
            height, width = smart_resize(
                size.height, size.width, self._token, settled.min_pixels, settled.max_pixels
            )
        except ValueError as error:
            raise ImageError(
                "image_too_stretched", f"{size.width} x {size.height}: {error}"
            ) from error
        return Size(width=width, height=height)

    def visual_tokens(self, size: Size, policy: ImagePolicy) -> int:
        """One token a square of ``patch_size * merge_size`` pixels of the resized image."""
        resized = self.resized(size, policy)
        return (resized.width // self._token) * (resized.height // self._token)

    def image_inputs(self, images: Sequence[Picture], policy: ImagePolicy) -> dict[str, Tensor]:
        """Patches ``(patches, channels*time*side*side)`` of all images, grids ``(images, 3)``."""
        if not images:
            return {}
        settled = self.settle(policy)
        arguments: dict[str, Any] = {"do_resize": True}
        if settled.size is not None:
            # A fixed size ignores the aspect, which the stock processor never does.
            from PIL.Image import Resampling

            size = self.resized(Size(*images[0].size), settled)
            resample = Resampling(self.parts.vision["resample"])
            images = [image.resize((size.width, size.height), resample) for image in images]
            arguments["do_resize"] = False
        else:
            arguments["size"] = {
                "shortest_edge": settled.min_pixels,
                "longest_edge": settled.max_pixels,
            }
        output = self.parts.image_processor(images=list(images), return_tensors="pt", **arguments)
        return {name: output[name] for name in ("pixel_values", "image_grid_thw")}

    def pictures(
        self,
        vision: Mapping[str, Tensor],
        sizes: Sequence[Size],  # noqa: ARG002
        policy: ImagePolicy,  # noqa: ARG002
    ) -> list[np.ndarray]:
        """Patches back in their places; of the two equal frames of an image, the first."""
        if not vision:
            return []
        side, merge = int(self.parts.vision["patch_size"]), int(self.parts.vision["merge_size"])
        grids = vision["image_grid_thw"].tolist()
        patches = vision["pixel_values"].split([t * rows * columns for t, rows, columns in grids])
        pictures = []
        for (_, rows, columns), values in zip(grids, patches, strict=True):
            shape = (rows // merge, columns // merge, merge, merge, 3, -1, side, side)
            first = values.reshape(shape)[:, :, :, :, :, 0]
            # rows, row in token, row in patch, and the same of columns
            whole = first.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * side, columns * side)
            pictures.append(self.denormalised(whole))
        return pictures

    def positions(self, tokens: Tokens, policy: ImagePolicy) -> Tensor:
        """M-RoPE positions of one row alone, shape (4, tokens): text, time, height, width.

        Four rows, not three: with three, packed neighbours see each other and nothing complains.
        """
        positions = np.empty((4, len(tokens)), dtype=np.int64)
        positions[0] = np.arange(len(tokens))
        sizes = iter(tokens.image_sizes)
        start, next_position = 0, 0
        while start < len(tokens):
            if not tokens.image_mask[start]:
                end = start
                while end < len(tokens) and not tokens.image_mask[end]:
                    end += 1
                positions[1:, start:end] = next_position + np.arange(end - start)
                next_position += end - start
            else:
                resized = self.resized(next(sizes), policy)
                rows, columns = resized.height // self._token, resized.width // self._token
                end = start + rows * columns
                positions[1, start:end] = next_position
                positions[2, start:end] = next_position + np.repeat(np.arange(rows), columns)
                positions[3, start:end] = next_position + np.tile(np.arange(columns), rows)
                next_position += max(rows, columns)
            start = end
        return torch.from_numpy(positions)

    def position_arguments(self, positions: Tensor) -> dict[str, Any]:
        """All four rows, ``(4, batch, tokens)``."""
        return {"position_ids": positions}

    def vision_arguments(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The model makes the positions of images from the token types."""
        inputs = super().vision_arguments(batch)
        if inputs:
            inputs["mm_token_type_ids"] = batch["image_mask"].to(torch.int32)
        return inputs

    def render_box(self, box: Box, size: Size, policy: ImagePolicy) -> list[Piece]:  # noqa: ARG002
        """``<|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>``."""
        x1, y1, x2, y2 = to_grid(box.xyxy, size, GRID)
        label = []
        if box.label:
            label = [
                Piece("<|object_ref_start|>", control=True),
                Piece(box.label),
                Piece("<|object_ref_end|>", control=True),
            ]
        return [
            *label,
            Piece("<|box_start|>", control=True),
            Piece(f"({x1},{y1}),({x2},{y2})"),
            Piece("<|box_end|>", control=True),
        ]

    def parse_boxes(self, text: str, sizes: Sequence[Size], policy: ImagePolicy) -> list[Box]:  # noqa: ARG002
        """All boxes of an answer; they lie on the latest picture."""
        if not sizes:
            return []
        image = len(sizes) - 1
        boxes = []
        for match in BOX.finditer(text):
            x1, y1, x2, y2 = (int(value) for value in match.groups()[1:])
            xyxy = from_grid((x1, y1, x2, y2), sizes[image], GRID)
            boxes.append(Box(image=image, label=match["label"] or "", xyxy=xyxy))
        return boxes

    def image_processor_config(self, policy: ImagePolicy) -> dict[str, Any]:
        """Trained limits in both spellings: old readers know ``max_pixels``, new ones ``size``."""
        settled = self.settle(policy)
        config = {**self.parts.vision, "image_processor_type": "Qwen2VLImageProcessor"}
        if settled.size is not None:
            area = settled.size[0] * settled.size[1]
            limits = {"shortest_edge": area, "longest_edge": area}
        else:
            assert settled.min_pixels is not None
            assert settled.max_pixels is not None
            limits = {"shortest_edge": settled.min_pixels, "longest_edge": settled.max_pixels}
        return {
            **config,
            "size": limits,
            "min_pixels": limits["shortest_edge"],
            "max_pixels": limits["longest_edge"],
        }

    @property
    def _token(self) -> int:
        """Side in pixels of the square that becomes one token: 28, of 14-pixel patches."""
        return int(self.parts.vision["patch_size"]) * int(self.parts.vision["merge_size"])
