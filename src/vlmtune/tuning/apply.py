"""Preparing a model for training: adapters put in, the rest frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmtune.errors import ModelError, RecipeError
from vlmtune.garbage import without_collecting
from vlmtune.models.family import FamilyFacts
from vlmtune.models.products import speed_up
from vlmtune.models.quantize import bitsandbytes_unseen
from vlmtune.tuning.config import TuningConfig, idle_rate
from vlmtune.tuning.parts import part_of, parts_of
from vlmtune.tuning.targets import Targets, exact_pattern, find_targets

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
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

    def saved(self) -> dict[str, Tensor]:
        """What is written of the model, by every name: what trains of an adapted one, else all."""
        everything = self.model.state_dict(keep_vars=True)
        if self.adapter is None:
            return everything
        return {name: tensor for name, tensor in everything.items() if tensor.requires_grad}


def check_tuning(model: PreTrainedModel, config: TuningConfig, facts: FamilyFacts) -> Targets:
    """Where the recipe's adapters go; needs no weights.

    Raises:
        RecipeError: If targets, parts or learning rates do not fit the model.
    """
    targets = find_targets(model, config, facts)
    fault = idle_rate(config.learning_rates, parts_of((*targets.adapted, *targets.saved), facts))
    if fault is not None:
        raise RecipeError(f"tuning.learning_rates: {fault}")
    return targets


@without_collecting()
def apply_tuning(
    model: PreTrainedModel, config: TuningConfig, facts: FamilyFacts, *, base_id: str
) -> Tuned:
    """Freeze, and put adapters in, as the recipe says.

    Args:
        model: The base.
        config: The recipe's ``tuning``.
        facts: The family's facts.
        base_id: Name of the base, recorded in the adapter's own configuration.

    Raises:
        RecipeError: If targets, parts or learning rates do not fit the model.
    """
    if not config.adapts:
        parts = config.trained_parts()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name, facts) in parts)
        return Tuned(model, None)
    targets = check_tuning(model, config, facts)
    with bitsandbytes_unseen():
        from peft import get_peft_model

        lora = _lora_config(config, targets, [name for name, _ in model.named_modules()])
        adapter = get_peft_model(model, lora)
    # Only now: peft would write the folder that a hub's model was loaded from over its id.
    lora.base_model_name_or_path = base_id
    _train_in_fp32(model)
    _speed_up(model)
    return Tuned(model, adapter)


def _lora_config(config: TuningConfig, targets: Targets, modules: Sequence[str]) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=exact_pattern(targets.adapted, modules),
        modules_to_save=list(targets.saved) or None,
        ensure_weight_tying=targets.tied,
        use_dora=config.method == "dora",
        use_rslora=config.method == "rslora",
        init_lora_weights=True if config.init == "default" else config.init,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _train_in_fp32(model: PreTrainedModel) -> None:
    """What trains is held in fp32 whatever the base is held in: small steps vanish in bf16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def _speed_up(model: PreTrainedModel) -> None:
    """Give the adapters' layers the products that the base's have, and fuse both."""
    from vlmtune.tuning.fused import fuse

    speed_up(model)
    fuse(model)


@without_collecting()
def load_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    trainable: bool,
    beside: PeftModel | None = None,
    name: str = "default",
) -> Tuned:
    """Put a saved adapter into a base.

    Args:
        model: The base.
        folder: The adapter.
        trainable: Whether it will be trained further.
        beside: The handle on adapters that are in the base already; the new one is not active.
        name: What peft calls it.

    Raises:
        ModelError: If a key of the adapter matches nothing, or a place of it stays without weights.
    """
    with bitsandbytes_unseen():
        from peft import PeftConfig, PeftModel
        from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
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
        adapter = _inject(model, config, folder, beside, name)
    assert isinstance(adapter, PeftModel)
    config.base_model_name_or_path = base_id
    held = get_peft_model_state_dict(adapter, adapter_name=name, save_embedding_layers=False)
    _require_all(folder, sorted(weights.keys() - held.keys()), sorted(held.keys() - weights.keys()))
    _train_in_fp32(model)
    _speed_up(model)
    try:
        set_peft_model_state_dict(adapter, weights, adapter_name=name)
    except RuntimeError as error:  # tensors of other shapes
        raise ModelError(_unfit(folder, " ".join(str(error).split())[:300])) from error
    return Tuned(model, adapter)


def _inject(
    model: PreTrainedModel, config: Any, folder: Path, beside: PeftModel | None, name: str
) -> Any:
    from peft import get_peft_model

    try:
        if beside is None:
            return get_peft_model(model, config, adapter_name=name)
        beside.add_adapter(name, config)
    except ValueError as error:  # no module is named like the adapter's
        raise ModelError(_unfit(folder, " ".join(str(error).split())[:300])) from error
    return beside


def _require_all(folder: Path, strangers: Sequence[str], empty: Sequence[str]) -> None:
    if strangers or empty:
        raise ModelError(
            _unfit(
                folder,
                f"{len(strangers)} of its tensors match nothing (first: {list(strangers[:2])}), "
                f"{len(empty)} places stay empty (first: {list(empty[:2])})",
            )
        )


def _unfit(folder: Path, reason: str) -> str:
    return (
        f"{folder}: the adapter does not fit this base: {reason}. It was trained on another model, "
        "or a part of its file is missing"
    )


def adapter_keys(folder: Path) -> list[str]:
    """Names of the tensors of a saved adapter."""
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        return list(file.keys())
