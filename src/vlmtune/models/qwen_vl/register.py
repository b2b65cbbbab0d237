"""Making Qwen-VL known to transformers' Auto classes."""

from __future__ import annotations

from vlmtune.models.torchvision import torchvision_fault


def register() -> None:
    """Let transformers' Auto classes read folders of Qwen-VL; calling it again is harmless.

    The original's model type is ``qwen``, which transformers itself does not know. A folder of a
    text-only Qwen is refused by name, see ``QwenVLConfig.from_dict``.
    """
    torchvision_fault()
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )

    from vlmtune.models.qwen_vl.configuration import QwenVLConfig
    from vlmtune.models.qwen_vl.modeling import QwenVLForConditionalGeneration, QwenVLModel
    from vlmtune.models.qwen_vl.processing import QwenVLImageProcessor, QwenVLProcessor
    from vlmtune.models.qwen_vl.tokenization import QWenTokenizer

    AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
    AutoModel.register(QwenVLConfig, QwenVLModel, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        auto.register(QwenVLConfig, QwenVLForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(QwenVLConfig, QWenTokenizer, exist_ok=True)
    classes: dict[str, type] = {"pil": QwenVLImageProcessor}
    AutoImageProcessor.register(QwenVLConfig, image_processor_classes=classes, exist_ok=True)
    AutoProcessor.register(QwenVLConfig, QwenVLProcessor, exist_ok=True)
