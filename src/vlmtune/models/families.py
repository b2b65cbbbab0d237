"""The table of families, and the one place where a model finds its own."""

from __future__ import annotations

from pathlib import Path

from vlmtune.errors import ModelError
from vlmtune.models.family import Family
from vlmtune.models.folder import load_config, read_json
from vlmtune.models.idefics2 import Idefics2
from vlmtune.models.qwen2_vl import Qwen2VL

FAMILIES: tuple[type[Family], ...] = (Qwen2VL, Idefics2)


def family_class(model_type: str) -> type[Family]:
    """The family of a ``model_type``.

    Raises:
        ModelError: If no family knows it.
    """
    for family in FAMILIES:
        if model_type in family.facts.model_types:
            return family
    known = ", ".join(sorted(kind for family in FAMILIES for kind in family.facts.model_types))
    raise ModelError(f"model type {model_type!r} is not supported; supported are: {known}")


def load_family(folder: str, backend: str = "pil") -> Family:
    """Bind the family of a model folder to its parts, without loading weights.

    Args:
        folder: A local model folder.
        backend: What resizes images: ``"pil"`` or ``"torchvision"``.
    """
    kind = str(read_json(Path(folder) / "config.json").get("model_type"))
    family = family_class(kind)
    return family(family.load_parts(folder, load_config(folder), backend))
