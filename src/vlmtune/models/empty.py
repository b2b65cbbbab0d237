"""A model without its weights: its modules' names, shapes and kinds, in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from vlmtune.models.folder import load_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def empty_model(folder: Path) -> PreTrainedModel:
    """The stock model of a folder on torch's meta device."""
    config = load_config(str(folder))
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return cast("PreTrainedModel", model)
