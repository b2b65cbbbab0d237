"""The model that a run begins or goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from vlmtune.errors import RecipeError
from vlmtune.models.attention import use_segments
from vlmtune.models.empty import empty_model
from vlmtune.models.family import FamilyFacts
from vlmtune.models.gptq import is_gptq
from vlmtune.models.head import use_loss_head
from vlmtune.models.load import DTYPES, BaseSource, LoadingConfig, load_model
from vlmtune.models.quantize import Quantization, plan_quantization
from vlmtune.recipe import Recipe
from vlmtune.training.checkpoint import seed_random
from vlmtune.training.compiling import compile_layers
from vlmtune.tuning.apply import Tuned, apply_tuning, check_tuning, load_adapter

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Recomputed = Literal["nothing", "vision", "language", "all"]


def quantization_of(recipe: Recipe, base: BaseSource, facts: FamilyFacts) -> Quantization | None:
    """What of the base the recipe holds in 4 bits; None too where its own folder packs them."""
    method = recipe.quantization
    if recipe.model.quantization is None and is_gptq(base.folder):
        return None
    return None if method is None else plan_quantization(base.folder, facts, method)


def check_start(recipe: Recipe, base: BaseSource, facts: FamilyFacts) -> None:
    """Find what the recipe's tuning asks of the model and cannot have, before anything is loaded.

    Raises:
        RecipeError: If targets, parts or learning rates do not fit the model, or packed weights
            should train themselves.
    """
    if recipe.tuning.adapts:
        check_tuning(empty_model(base.folder), recipe.tuning, facts)
    elif is_gptq(base.folder):
        raise RecipeError(
            "tuning.method: full fine-tuning changes the weights themselves, and those of "
            f"{base.id} are packed in 4 bits by GPTQ; use tuning.method=qlora, or the plain model"
        )


def place_of(recipe: Recipe) -> tuple[torch.device, torch.dtype]:
    """Device and number format: adapters train over a base in that of the products, else fp32."""
    precision = recipe.training.precision if recipe.tuning.adapts else "fp32"
    device = LoadingConfig(device=recipe.model.device).resolve()[0]
    return device, DTYPES[recipe.model.dtype or precision]


def load_start(
    recipe: Recipe,
    base: BaseSource,
    checkpoint: Path | None,
    quantization: Quantization | None,
    *,
    to_be_cut: bool = False,
) -> PreTrainedModel:
    """The base, or what a full fine-tuning had made of it at a checkpoint.

    What is cut among several processes later need not fit on the device of one, and stays in the
    memory of the CPU until then.
    """
    device, dtype = place_of(recipe)
    if to_be_cut:
        device = torch.device("cpu")
    whole = checkpoint is not None and not recipe.tuning.adapts
    return load_model(
        checkpoint if checkpoint is not None and whole else base.folder,
        dtype=dtype,
        device=device,
        quantization=quantization,
        compute=DTYPES[recipe.training.precision],
        device_map=recipe.model.device_map,
    )


def stated(recipe: Recipe) -> Recomputed | None:
    """What the recipe says of computing again; None: it leaves that open."""
    said = recipe.training.gradient_checkpointing
    if said == "auto":
        return None
    return "all" if said else "nothing"


def recompute_activations(
    model: PreTrainedModel, tower: nn.Module, recomputed: Recomputed = "all"
) -> None:
    """Keep no activations within layers; the backward pass makes them again.

    Args:
        model: With what trains in it.
        tower: Its vision tower; frozen, it has no backward pass, and nothing to make again.
        recomputed: Of what part.

    Raises:
        RecipeError: If the model's class cannot do so.
    """
    if recomputed == "nothing":
        return
    if not model.supports_gradient_checkpointing:
        raise RecipeError(
            f"training.gradient_checkpointing: found true, and {type(model).__name__} has no "
            "layers that can be computed again; set it to auto or false, and lower "
            "training.token_budget where memory ends"
        )
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.activation_checkpointing_enable({"use_reentrant": False})
    # For adapters transformers lets all inputs ask for gradients, which reentrant checkpoints need.
    # A frozen vision tower would get a whole backward pass for nothing.
    model.disable_input_require_grads()
    seen, frozen = set(tower.modules()), not any(each.requires_grad for each in tower.parameters())
    for layer in model.modules():
        kept = frozen or recomputed == "language" if layer in seen else recomputed == "vision"
        if kept and isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = False


def tune(
    model: PreTrainedModel,
    recipe: Recipe,
    facts: FamilyFacts,
    base: BaseSource,
    checkpoint: Path | None,
    recomputed: Recomputed = "nothing",
) -> Tuned:
    """Put fresh adapters in, or those of a checkpoint; freeze the rest.

    Args:
        model: The base, or what a full fine-tuning made of it.
        recipe: The recipe.
        facts: The family's facts.
        base: The base.
        checkpoint: Where the adapters are; None: fresh ones.
        recomputed: Whose activations are computed again and not kept.
    """
    seed_random(recipe.training.seed)
    if checkpoint is not None and recipe.tuning.adapts:
        tuned = load_adapter(model, checkpoint, trainable=True)
    else:
        tuned = apply_tuning(model, recipe.tuning, facts, base_id=base.id)
    use_loss_head(model)
    if facts.segments and place_of(recipe)[0].type == "cuda":
        use_segments(model.get_submodule(facts.vision_tower))
    recompute_activations(model, model.get_submodule(facts.vision_tower), recomputed)
    if recipe.training.compile:
        compile_layers(model, facts)
    return tuned
