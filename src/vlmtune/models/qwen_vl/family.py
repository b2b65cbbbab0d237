"""Qwen-VL (Bai et al. 2023, arXiv 2308.12966) as a family: one square, 256 tokens, ChatML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ModelError
from vlmtune.models.family import Family, FamilyFacts, Join, Parts, Piece
from vlmtune.models.folder import load_template
from vlmtune.models.qwen_vl import boxes
from vlmtune.models.qwen_vl.controls import IMAGE_PAD, TURN_END, TURN_START
from vlmtune.models.qwen_vl.tokenization import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FACTS = FamilyFacts(
    name="qwen_vl",
    model_types=("qwen",),
    processor_class="QwenVLProcessor",
    image_processor="QwenVLImageProcessor",
    vision_tower="transformer.visual",
    projector=("transformer.visual.attn_pool",),
    language_model=("transformer.wte", "transformer.h", "transformer.ln_f", "lm_head"),
    image_token=IMAGE_PAD,
    end_of_turn=TURN_END,
    further_ends=(TURN_START,),
    labels_once=True,
    # The feed-forward layer's output is not among the original's, hence attn.c_proj by two names.
    lora_targets=("c_attn", "attn.c_proj", "w1", "w2"),
    joins={"pixel_values": Join.CONCATENATE},
    packs=True,
    features="list",
)


class QwenVL(Family):
    """The family, bound to one model's parts.

    The original's folders have neither a chat template nor settings of an image processor: both are
    known, the template as the tokenizer's own, the settings from ``visual`` in ``config.json``.

    The line break that the template writes behind an answer's ``<|im_end|>`` is not trained, unlike
    in the original: no model has to say it.
    """

    facts = FACTS

    @classmethod
    def load_parts(cls, folder: str, config: PreTrainedConfig, backend: str) -> Parts:
        """Read the tokenizer; the image processor is made of the configuration.

        Raises:
            ModelError: If another backend than Pillow's is asked for.
        """
        from vlmtune.models.qwen_vl.configuration import QwenVLConfig
        from vlmtune.models.qwen_vl.processing import image_processor_of

        assert isinstance(config, QwenVLConfig)
        if backend != "pil":
            raise ModelError(
                f"model.backend: found {backend}; the family {cls.facts.name} resizes images with "
                "Pillow alone, use model.backend=pil"
            )
        processor = image_processor_of(config)
        tokenizer = load_tokenizer(folder)
        return Parts(
            config=config,
            tokenizer=tokenizer,
            image_processor=processor,
            template=load_template(folder, tokenizer),
            backend=backend,
            vision=processor.to_dict(),
            processor={"image_seq_length": config.vision.n_queries},
        )

    def resized(self, size: Size, policy: ImagePolicy) -> Size:  # noqa: ARG002
        """The one square, whatever the aspect."""
        own = self.parts.vision["size"]
        return Size(width=int(own["width"]), height=int(own["height"]))

    def visual_tokens(self, size: Size, policy: ImagePolicy) -> int:  # noqa: ARG002
        """As many as the resampler has queries."""
        return int(self.parts.processor["image_seq_length"])

    def render_box(self, box: Box, size: Size, policy: ImagePolicy) -> list[Piece]:  # noqa: ARG002
        """``<ref>label</ref><box>(x1,y1),(x2,y2)</box>``, integers 0 … 999."""
        return boxes.render_box(box, size)

    def parse_boxes(self, text: str, sizes: Sequence[Size], policy: ImagePolicy) -> list[Box]:  # noqa: ARG002
        """All boxes of an answer; they lie on the latest picture."""
        return boxes.parse_boxes(text, sizes)
