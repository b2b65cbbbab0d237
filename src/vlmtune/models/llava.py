"""LLaVA 1.5 (Liu et al. 2023, arXiv 2310.03744): one square view, an MLP, Vicuna or another model.

The template of the models on the hubs writes no end of an answer; the encoder adds the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from vlmtune.data.boxes import from_grid, to_grid
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ModelError, UsageError
from vlmtune.models import box_syntax
from vlmtune.models.family import Family, FamilyFacts, Join, Parts, Piece
from vlmtune.models.folder import image_processor_type

# Tokens that a tower puts before those of the patches.
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
GRID = 1000  # boxes have three decimals

FACTS = FamilyFacts(
    name="llava",
    model_types=("llava",),
    processor_class="LlavaProcessor",
    image_processor="CLIPImageProcessor",
    vision_tower="model.vision_tower",
    projector=("model.multi_modal_projector",),
    language_model=("model.language_model", "lm_head"),
    image_token="<image>",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    image_options=frozenset({"size"}),
    joins={"pixel_values": Join.CONCATENATE},
    packs=True,
    features="list",
)


class LlavaLine(Family):
    """What all models of the line have in common: towers of one square size, and boxes.

    Boxes are ``[x1, y1, x2, y2]``, fractions of the square that an image is padded to, the picture
    in its middle, as in the data that the line was trained on; with three decimals where that data
    has two, since a hundredth of a page is more than a line of text. Of a box with a label:
    ``label: [x1, y1, x2, y2]``.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        tower = self._config["vision_config"]["model_type"]
        if tower not in CLASS_TOKENS:
            raise ModelError(
                f"the family {self.facts.name} knows the vision towers "
                f"{', '.join(sorted(CLASS_TOKENS))}; this model has {tower!r}"
            )

    def render_box(self, box: Box, size: Size, policy: ImagePolicy) -> list[Piece]:  # noqa: ARG002
        """``label: [0.123, 0.250, 0.500, 1.000]``."""
        square, left, top = _square(size)
        x1, y1, x2, y2 = box.xyxy
        moved = (x1 + left, y1 + top, x2 + left, y2 + top)
        corners = to_grid(moved, square, GRID, closed=True)
        return [Piece(box_syntax.render_fractions(box.label, corners))]

    def parse_boxes(self, text: str, sizes: Sequence[Size], policy: ImagePolicy) -> list[Box]:  # noqa: ARG002
        """All boxes of an answer, of however many decimals; they lie on the latest picture."""
        if not sizes:
            return []
        square, left, top = _square(sizes[-1])
        boxes = []
        for label, fractions in box_syntax.parse_fractions(text):
            x1, y1, x2, y2 = from_grid(fractions, square, 1)
            xyxy = (x1 - left, y1 - top, x2 - left, y2 - top)
            boxes.append(box_syntax.on_last_image(label, xyxy, sizes))
        return boxes

    @cached_property
    def _config(self) -> dict[str, Any]:
        return self.parts.config.to_dict()

    @cached_property
    def _side(self) -> int:
        """Patches along a side of the tower's square."""
        vision = self._config["vision_config"]
        return int(vision["image_size"]) // int(vision["patch_size"])

    @cached_property
    def _view_tokens(self) -> int:
        """Visual tokens of a square: its patches, and what the tower puts before them if kept."""
        tokens = self._side**2 + CLASS_TOKENS[self._config["vision_config"]["model_type"]]
        # "default" drops the first, whatever it is; "full" keeps all.
        return tokens - (self._config["vision_feature_select_strategy"] == "default")


class Llava(LlavaLine):
    """The family, bound to one model's parts.

    The models on the hubs scale the shorter side to the tower's and cut off what sticks out of the
    middle. ``image.size``, set to the tower's own square, squeezes the whole picture into it.
    """

    facts = FACTS

    def settle(self, policy: ImagePolicy) -> ImagePolicy:
        """The policy as it is: the tower sees one size.

        Raises:
            UsageError: If another fixed size is asked for.
        """
        policy = super().settle(policy)
        if policy.size not in (None, tuple(self._view)[::-1]):
            width, height = self._view
            raise UsageError(
                f"image.size: found {list(policy.size or ())}, and the vision tower sees "
                f"[{height}, {width}] alone. That value squeezes the whole picture into it; "
                "without it the picture is prepared as the model's own processor does"
            )
        return policy

    def processor_arguments(self, settled: ImagePolicy) -> dict[str, Any]:
        """A fixed size leaves nothing to cut and nothing to pad."""
        if settled.size is None:
            return {}
        height, width = settled.size
        padding = {"do_pad": False} if self._pads else {}
        return {"size": {"height": height, "width": width}, **padding}

    def resized(self, size: Size, policy: ImagePolicy) -> Size:
        """Size of the whole picture, what is cut off included."""
        own = self.parts.vision["size"]
        if policy.size is not None or "height" in own:
            return self._view
        if self._pads:
            left, top, right, bottom = padded(size, self._view.width)
            return Size(width=right - left, height=bottom - top)
        shorter, longer = min(size), max(size)
        short = int(own["shortest_edge"])
        long = int(short * longer / shorter)
        return Size(short, long) if size.width <= size.height else Size(long, short)

    def visible(self, size: Size, policy: ImagePolicy) -> float:
        """The middle of the picture where it is cut, else all of it."""
        if policy.size is None and self._pads:
            return 1.0
        whole, view = self.resized(size, policy), self._view
        seen = min(view.width, whole.width) * min(view.height, whole.height)
        return seen / (whole.width * whole.height)

    def visual_tokens(self, size: Size, policy: ImagePolicy) -> int:  # noqa: ARG002
        """As many as the tower gives, whatever the size."""
        return self._view_tokens

    def pictures(
        self, vision: Mapping[str, Tensor], sizes: Sequence[Size], policy: ImagePolicy
    ) -> list[np.ndarray]:
        """The whole pictures, black where they are cut off; without padding, if there is any."""
        pictures = []
        for size, seen in zip(sizes, super().pictures(vision, sizes, policy), strict=True):
            if policy.size is None and self._pads:
                left, top, right, bottom = padded(size, self._view.width)
                pictures.append(seen[top:bottom, left:right])
            else:
                pictures.append(_uncut(seen, self.resized(size, policy)))
        return pictures

    @cached_property
    def _view(self) -> Size:
        """What the tower sees."""
        vision = self.parts.vision
        view = vision["crop_size"] if vision.get("do_center_crop") else vision["size"]
        return Size(width=int(view["width"]), height=int(view["height"]))

    @cached_property
    def _pads(self) -> bool:
        """Whether the picture is padded to a square; only the line's own processor can."""
        own = image_processor_type(self.parts.image_processor) == "LlavaImageProcessor"
        return own and bool(self.parts.vision.get("do_pad"))


def padded(size: Size, side: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a picture in the square of ``side`` pixels it is padded to."""
    square, left, top = _square(size)
    scale = side / square.width
    x1, y1 = min(round(left * scale), side - 1), min(round(top * scale), side - 1)
    x2, y2 = round((left + size.width) * scale), round((top + size.height) * scale)
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


def _square(size: Size) -> tuple[Size, int, int]:
    """The square that a picture is padded to, and where its left and upper edges lie in it."""
    side = max(size)
    return Size(side, side), (side - size.width) // 2, (side - size.height) // 2


def _uncut(seen: np.ndarray, whole: Size) -> np.ndarray:
    """The middle of a picture back in its place."""
    height, width = seen.shape[:2]
    top, left = (whole.height - height) // 2, (whole.width - width) // 2
    picture = np.zeros((whole.height, whole.width, 3), dtype=np.uint8)
    rows = slice(max(top, 0), min(top + height, whole.height))
    columns = slice(max(left, 0), min(left + width, whole.width))
    # Of a picture smaller than the cut, the rest of the cut is padding.
    picture[rows, columns] = seen[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    return picture
