"""Which part of a stock model is which, read from its modules: no weights are made or read."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmtune.errors import ModelError
from vlmtune.models.quantize import within

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model, as ``FamilyFacts`` names them.

    Attributes:
        vision_tower: Prefix of the vision tower's parameters.
        projector: Prefixes of whatever belongs neither to the tower nor to the language model.
        language_model: Prefixes of the language model's parameters, its head included.
        linear: Last names of the linear layers of the language model, its head left out.
    """

    vision_tower: str
    projector: tuple[str, ...]
    language_model: tuple[str, ...]
    linear: tuple[str, ...]


def dissect(config: PreTrainedConfig) -> Anatomy:
    """Read the parts of the model that a configuration describes.

    Raises:
        ModelError: If the class cannot be trained here, or its parts cannot be told apart.
    """
    model = _hollow(config)
    name = type(model).__name__
    if config.is_encoder_decoder:
        raise ModelError(
            f"{name} is an encoder and a decoder; vlmtune trains models that write their answer "
            "after the question, in one sequence"
        )
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"the forward of {name} takes no logits_to_keep, so that a step would make logits for "
            "every token of the prompts too; vlmtune does not train it"
        )
    names = {module: path for path, module in model.named_modules()}
    tower = names.get(model.get_encoder(modality="image"), "")
    language = [names.get(model.get_decoder(), "")]
    if not tower or not language[0] or within(tower, language) or within(language[0], (tower,)):
        raise ModelError(
            f"vision tower and language model of {name} cannot be told apart (found {tower!r} and "
            f"{language[0]!r}): add a family that names them, see docs/add-a-family.md"
        )
    head = model.get_output_embeddings()
    for module in (head, model.get_input_embeddings()):
        path = names.get(module, "")
        if path and not within(path, language):
            language.append(path)
    return Anatomy(
        vision_tower=tower,
        projector=_remaining([path for path, _ in model.named_parameters()], (tower, *language)),
        language_model=tuple(language),
        linear=_linear(model, tuple(language), head),
    )


def _hollow(config: PreTrainedConfig) -> Any:
    """The model without memory for its weights."""
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"a model of type {config.model_type!r} cannot be made by the installed transformers: "
            f"{error}"
        ) from error


def _remaining(parameters: Iterable[str], taken: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest prefixes that cover the parameters outside ``taken`` and none inside."""
    names = list(parameters)
    inside = [name for name in names if within(name, taken)]
    found: list[str] = []
    for name in names:
        if within(name, taken) or within(name, found):
            continue
        parts = name.split(".")
        prefixes = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        found.append(
            next(each for each in prefixes if not any(within(other, (each,)) for other in inside))
        )
    return tuple(found)


def _linear(model: nn.Module, language: tuple[str, ...], head: nn.Module | None) -> tuple[str, ...]:
    chosen = dict.fromkeys(
        path.rsplit(".", 1)[-1]
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and within(path, language)
    )
    return tuple(chosen)
