"""Preparing a model for training: adapters put in, the rest frozen."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmtune.errors import ModelError, RecipeError
from vlmtune.models.family import FamilyFacts
from vlmtune.tuning.config import TuningConfig
from vlmtune.tuning.parts import part_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Tuned:
    """A model with what trains in it.

    Attributes:
        model: The stock model; adapters, if any, sit inside its layers.
        adapter: peft's handle on the adapters, or None for full fine-tuning.
    """

    model: PreTrainedModel
    adapter: PeftModel | None

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that train, by name, in the model's order."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }


def apply_tuning(
    model: PreTrainedModel, config: TuningConfig, facts: FamilyFacts, *, base_id: str
) -> Tuned:
    """Freeze, and put adapters in, as the recipe says.

    Args:
        model: The base.
        config: The recipe's ``tuning``.
        facts: The family's facts.
        base_id: Name of the base, recorded in the adapter's own configuration.
    """
    if config.method == "full":
        parts = config.trained_parts()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name, facts) in parts)
        return Tuned(model, None)
    from peft import LoraConfig, get_peft_model

    pattern = target_pattern(config.targets, facts)
    _require_targets(model, pattern)
    if isinstance(config.targets, tuple):
        for name in config.targets:  # a name that matches nothing is a mistake, beside others too
            _require_targets(model, target_pattern((name,), facts), name)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=pattern,
        bias="none",
        task_type="CAUSAL_LM",
    )
    # The adapters train in fp32 whatever the base is held in: small steps vanish in bf16.
    adapter = get_peft_model(model, lora, autocast_adapter_dtype=True)
    # Only now: peft would write the folder that a hub's model was loaded from over its id.
    lora.base_model_name_or_path = base_id
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return Tuned(model, adapter)


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool) -> Tuned:
    """Put a saved adapter into a base.

    Raises:
        ModelError: If a key of the adapter matches nothing, or a place of it stays without weights.
    """
    from peft import PeftConfig, PeftModel, get_peft_model
    from peft.utils import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be read as an adapter: {error}") from error
    config.inference_mode = not trainable
    # The contract says by hash whether this is the right base; peft compares names of folders.
    base_id, config.base_model_name_or_path = config.base_model_name_or_path, None
    adapter = get_peft_model(model, config)
    assert isinstance(adapter, PeftModel)
    config.base_model_name_or_path = base_id
    try:
        result: Any = set_peft_model_state_dict(adapter, weights)
    except RuntimeError as error:  # tensors of other shapes
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{folder}: the adapter does not fit this base ({reason}). It was trained on another "
            "model"
        ) from error
    missing = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or missing:
        raise ModelError(
            f"{folder}: the adapter does not fit this base: {len(result.unexpected_keys)} of its "
            f"tensors match nothing (first: {list(result.unexpected_keys)[:2]}), {len(missing)} "
            f"places stay empty (first: {missing[:2]}). It was trained on another model"
        )
    return Tuned(model, adapter)


def adapter_keys(folder: Path) -> list[str]:
    """Names of the tensors of a saved adapter."""
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        return list(file.keys())


def target_pattern(targets: tuple[str, ...] | str | None, facts: FamilyFacts) -> str:
    """The regular expression over full module names that LoRA adapts.

    A list of names means layers of the language model: the vision tower often has layers of the
    same names.
    """
    if isinstance(targets, str):
        return targets
    names = targets if targets is not None else facts.lora_targets
    prefixes = "|".join(re.escape(prefix) for prefix in facts.language_model)
    # The prefix itself may be the layer: an output layer stands outside the model's body.
    return rf"^(?=(?:{prefixes})(?:\.|$))(?:.+\.)?(?:{'|'.join(map(re.escape, names))})$"


def _require_targets(model: nn.Module, pattern: str, name: str | None = None) -> None:
    matcher = re.compile(pattern)
    if not any(matcher.fullmatch(name) for name, _ in model.named_modules()):
        linear = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear)
            }
        )
        raise RecipeError(
            f"tuning.targets: {name or pattern!r} matches no module of the model; linear layers "
            f"are named {', '.join(linear)}"
        )
