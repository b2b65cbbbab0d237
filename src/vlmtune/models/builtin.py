"""The built-in base: a small model inside the package, opened like a folder on the disk."""

from __future__ import annotations

from pathlib import Path

from vlmtune.errors import ModelError
from vlmtune.models.load import BaseSource

BUILTIN = "builtin:base"
FOLDER = Path(__file__).resolve().parents[1] / "quickstart" / "base" / "weights"


def builtin_base() -> BaseSource:
    """The built-in base.

    Raises:
        ModelError: If this installation lacks its weights.
    """
    if not (FOLDER / "config.json").is_file():
        raise ModelError(
            f"{BUILTIN}: {FOLDER} holds no model; expected config.json and model.safetensors, "
            "which every wheel and every full checkout bring. Install vlmtune again, or make the "
            "base anew: python -m vlmtune.quickstart.base.pretrain OUT"
        )
    return BaseSource(FOLDER, BUILTIN)
