"""The table of families, and the one place where a model finds its own."""

from __future__ import annotations

from pathlib import Path

from vlmtune.errors import ModelError
from vlmtune.garbage import without_collecting
from vlmtune.models.family import Family
from vlmtune.models.folder import load_config, read_json
from vlmtune.models.gemma3 import Gemma3
from vlmtune.models.generic import Generic
from vlmtune.models.idefics2 import Idefics2
from vlmtune.models.idefics3 import Idefics3, SmolVLM
from vlmtune.models.internvl import InternVL
from vlmtune.models.llava import Llava
from vlmtune.models.llava_next import LlavaNext
from vlmtune.models.llava_onevision import LlavaOnevision
from vlmtune.models.qwen2_5_vl import Qwen25VL
from vlmtune.models.qwen2_vl import Qwen2VL
from vlmtune.models.qwen3_vl import Qwen3VL
from vlmtune.models.qwen_vl.family import QwenVL
from vlmtune.models.torchvision import torchvision_fault

FAMILIES: tuple[type[Family], ...] = (
    Qwen2VL,
    Qwen25VL,
    Qwen3VL,
    QwenVL,
    InternVL,
    Idefics2,
    Idefics3,
    SmolVLM,
    Llava,
    LlavaNext,
    LlavaOnevision,
    Gemma3,
)


def family_class(model_type: str) -> type[Family]:
    """The family of a ``model_type``; one that transformers alone knows is read from its class.

    Raises:
        ModelError: If nobody knows it.
    """
    for family in FAMILIES:
        if model_type in family.facts.model_types:
            return family
    torchvision_fault()
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return Generic
    known = ", ".join(sorted(kind for family in FAMILIES for kind in family.facts.model_types))
    raise ModelError(
        f"model type {model_type!r} is not supported; supported are: {known}; and every class that "
        "transformers loads as AutoModelForImageTextToText"
    )


@without_collecting()
def load_family(folder: str, backend: str = "pil") -> Family:
    """Bind the family of a model folder to its parts, without loading weights.

    Args:
        folder: A local model folder.
        backend: What resizes images: ``"pil"`` or ``"torchvision"``.
    """
    kind = str(read_json(Path(folder) / "config.json").get("model_type"))
    family = family_class(kind)
    return family(family.load_parts(folder, load_config(folder), backend))
