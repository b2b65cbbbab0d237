"""Writing a model folder that any engine reads, with the contract beside the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.models.contract import Contract
from vlmtune.models.family import Family

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# What a base brings besides weights and processor settings; copied as it is, byte for byte.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
)


def save_model(
    model: PreTrainedModel,
    out: Path,
    *,
    family: Family,
    contract: Contract,
    base: Path,
    shard_size: str = "5GB",
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights as safetensors shards and everything that an engine needs beside them.

    Args:
        model: A stock model without adapters in it.
        out: An existing, empty folder.
        family: The family, for the processor's configuration.
        contract: The contract to lay beside the weights; its image limits go into the processor.
        base: Folder of the base, whose tokenizer and template are copied.
        shard_size: Largest size of one safetensors file.
        tensors: The weights, where the model holds others by now; None: the model's own.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    weights = None if tensors is None else dict(tensors)  # it is emptied
    model.save_pretrained(out, max_shard_size=shard_size, state_dict=weights)
    for path in out.glob("*.safetensors"):
        path.chmod(0o644)  # written through a temporary file that only its owner may read
    for name in COMPANIONS:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    if not any((out / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        (out / "chat_template.jinja").write_text(family.parts.template, encoding="utf-8")
    settings = family.image_processor_config(contract.image)
    class_name = family.facts.processor_class
    # Engines read one or the other of these two; both hold the trained limits.
    _write(out / "preprocessor_config.json", {**settings, "processor_class": class_name})
    own = {**family.parts.processor, "processor_class": class_name}
    _write(out / "processor_config.json", {**own, "image_processor": settings})
    contract.write(out)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
