"""Image processor and processor of Qwen-VL as transformers knows them, for those who use it alone.

vlmtune itself encodes rows with its own encoder, in which a user's text never becomes a control
token; what both make of a conversation is compared in the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pictures
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling

from vlmtune.models.folder import load_config
from vlmtune.models.qwen_vl.configuration import QwenVLConfig
from vlmtune.models.qwen_vl.controls import IMAGE_PAD
from vlmtune.models.qwen_vl.pixels import MEAN, STD, pixel_values
from vlmtune.models.qwen_vl.tokenization import load_tokenizer

FILES = ("preprocessor_config.json", "processor_config.json")


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
    model_input_names: list[str] = ["pixel_values"]  # noqa: RUF012

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

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **options: Any
    ) -> Any:
        """As in transformers, and from the original's folders, which have no processor's files."""
        folder = Path(str(pretrained_model_name_or_path))
        if not folder.is_dir() or any((folder / name).is_file() for name in FILES):
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        config = load_config(str(folder))
        assert isinstance(config, QwenVLConfig)
        tokenizer = load_tokenizer(folder)
        return cls(image_processor_of(config), tokenizer, image_seq_length=config.vision.n_queries)

    def replace_image_token(
        self,
        image_inputs: dict[str, Any],  # noqa: ARG002
        image_idx: int,  # noqa: ARG002
        **settings: Any,  # noqa: ARG002
    ) -> str:
        """What stands for an image; all have equally many tokens."""
        return self.image_token * self.image_seq_length


def image_processor_of(config: QwenVLConfig) -> QwenVLImageProcessor:
    """The image processor that a configuration means."""
    side = config.vision.image_size
    return QwenVLImageProcessor(size={"height": side, "width": side})
