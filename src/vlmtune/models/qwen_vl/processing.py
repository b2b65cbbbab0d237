"""Image processor and processor of Qwen-VL as transformers knows them, for those who use it alone.

vlmtune itself encodes rows with its own encoder, in which a user's text never becomes a control
token; what both make of a conversation is compared in the tests.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from PIL import Image as Pictures
from transformers import ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling

from vlmtune.models.qwen_vl.controls import IMAGE_PAD
from vlmtune.models.qwen_vl.pixels import MEAN, STD, pixel_values


class QwenVLImageProcessor(PilBackend):
    """Images squashed to a square, bicubic, and normalised.

    Args:
        settings: ``size`` and ``image_mean`` and the like, as every image processor has them.
    """

    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    rescale_factor = 1 / 255
    resample = PILImageResampling.BICUBIC
    size: Any = {"height": 448, "width": 448}  # noqa: RUF012
    image_mean = MEAN
    image_std = STD
    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def _preprocess(  # type: ignore[override]
        self,
        images: list[np.ndarray],
        size: Any,
        return_tensors: str | None = None,
        **settings: Any,  # noqa: ARG002
    ) -> BatchFeature:
        """Images ``(channels, height, width)``, uint8, to ``pixel_values (images, 3, side, side)``.

        The steps are the model's own, whatever the settings say; only the side is read.
        """
        pictures = [Pictures.fromarray(image.transpose(1, 2, 0)) for image in images]
        found = [pixel_values(picture, int(size["height"])).numpy() for picture in pictures]
        return BatchFeature({"pixel_values": np.stack(found)}, tensor_type=return_tensors)


class QwenVLProcessor(ProcessorMixin):
    """Tokenizer and image processor as one, as transformers' pipelines want them.

    Args:
        image_processor: A ``QwenVLImageProcessor``.
        tokenizer: A ``QWenTokenizer``.
        image_seq_length: Tokens of an image, ``visual.n_queries``.
        chat_template: Instead of the tokenizer's.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
    ) -> None:
        self.image_seq_length = image_seq_length
        self.image_token = IMAGE_PAD
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        template = chat_template or tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)

    def replace_image_token(
        self,
        image_inputs: dict[str, Any],  # noqa: ARG002
        image_idx: int,  # noqa: ARG002
        **settings: Any,  # noqa: ARG002
    ) -> str:
        """What stands for an image; all have equally many tokens."""
        return self.image_token * self.image_seq_length
