"""Idefics2 (Laurençon et al. 2024, arXiv 2405.02246): native aspect, 64 latents an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from vlmtune.data.media import ImagePolicy, Size
from vlmtune.models.family import Family, FamilyFacts, Join, Piece

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

AROUND = "<fake_token_around_image>"
CROPS = 4  # quarters that are shown before the whole where images are split

FACTS = FamilyFacts(
    name="idefics2",
    model_types=("idefics2",),
    processor_class="Idefics2Processor",
    image_processor="Idefics2ImageProcessor",
    vision_tower="model.vision_model",
    projector=("model.connector",),
    language_model=("model.text_model", "lm_head"),
    image_token="<image>",
    end_of_turn="<end_of_utterance>",
    collapses=AROUND,
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    image_options=frozenset({"longest_edge", "split"}),
    joins={"pixel_values": Join.PAD, "pixel_attention_mask": Join.PAD},
    packs=True,
    features="list",
)


class Idefics2(Family):
    """The family, bound to one model's parts."""

    facts = FACTS

    def settle(self, policy: ImagePolicy) -> ImagePolicy:
        """Limits left open become the model's own."""
        policy = super().settle(policy)
        own = self.parts.vision
        split = own["do_image_splitting"] if policy.split is None else policy.split
        longest = policy.longest_edge or own["size"]["longest_edge"]
        return policy.model_copy(update={"longest_edge": longest, "split": bool(split)})

    def processor_arguments(self, settled: ImagePolicy) -> dict[str, Any]:
        """The longer side; the shorter one is never below the model's own."""
        longest = settled.longest_edge
        assert longest is not None
        shortest = min(longest, self.parts.vision["size"]["shortest_edge"])
        return {
            "size": {"longest_edge": longest, "shortest_edge": shortest},
            "do_image_splitting": settled.split,
        }

    def resized(self, size: Size, policy: ImagePolicy) -> Size:
        """The longer side at most ``longest_edge``, the shorter at least ``shortest_edge``."""
        limits = self.processor_arguments(self.settle(policy))["size"]
        width, height = size
        aspect = width / height
        if width >= height and width > limits["longest_edge"]:
            width = limits["longest_edge"]
            height = int(width / aspect)
        elif height > width and height > limits["longest_edge"]:
            height = limits["longest_edge"]
            width = int(height * aspect)
        return Size(
            width=max(width, limits["shortest_edge"]), height=max(height, limits["shortest_edge"])
        )

    def visual_tokens(self, size: Size, policy: ImagePolicy) -> int:  # noqa: ARG002
        """As many as the resampler has latents, whatever the size."""
        return self._latents * self._views(policy)

    def image_span(self, size: Size, policy: ImagePolicy) -> tuple[Piece, ...]:  # noqa: ARG002
        """Each view between two marks; where two views meet, their marks become one."""
        around = Piece(AROUND, control=True)
        view = (around, Piece(self.facts.image_token, control=True, count=self._latents), around)
        return view * self._views(policy)

    def text_after(self, control: str, text: str) -> str:
        """The processor keeps a word from sticking to an image."""
        sticks = control == AROUND and text and not text[0].isspace() and text[0] != "<"
        return f" {text}" if sticks else text

    def _processed(self, image: Picture, policy: ImagePolicy) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in super()._processed(image, policy).items()}

    def vision_arguments(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """All images of the batch as those of one row: ``(1, images, channels, height, width)``."""
        return {
            name: tensor.unsqueeze(0) for name, tensor in super().vision_arguments(batch).items()
        }

    def pictures(
        self, vision: Mapping[str, Tensor], sizes: Sequence[Size], policy: ImagePolicy
    ) -> list[np.ndarray]:
        """The whole of each image, without the padding."""
        views = self._views(policy)
        pictures = []
        for index, size in enumerate(sizes):
            resized = self.resized(size, policy)
            whole = vision["pixel_values"][index * views + views - 1]
            pictures.append(self.denormalised(whole[:, : resized.height, : resized.width]))
        return pictures

    def _views(self, policy: ImagePolicy) -> int:
        return CROPS + 1 if self.settle(policy).split else 1

    @property
    def _latents(self) -> int:
        """Visual tokens of a view."""
        return int(self.parts.config.to_dict()["perceiver_config"]["resampler_n_latents"])
