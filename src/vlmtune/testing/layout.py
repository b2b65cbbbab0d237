"""Writing a model in the layout of a hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


def write_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    processor: dict[str, Any],
    ends: Sequence[str],
) -> None:
    """Write weights, tokenizer, generation settings and the image processor's settings.

    Args:
        folder: An existing folder.
        model: The model.
        tokenizer: Its tokenizer, chat template included.
        processor: What ``preprocessor_config.json`` says.
        ends: Tokens at which generation stops.
    """
    model.generation_config.update(
        eos_token_id=[tokenizer.convert_tokens_to_ids(end) for end in ends],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", processor)


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Id of a control token."""
    return tokenizer.get_added_vocab()[token]


def seeded(model_class: Any, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A random model; nobody else's random numbers are touched."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config)
    return model


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as hubs hold them."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
