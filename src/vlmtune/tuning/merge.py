"""Adapter + base -> plain weights, with the means to prove it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from vlmtune.errors import MergeError
from vlmtune.models.family import FamilyFacts
from vlmtune.tuning.apply import Tuned
from vlmtune.tuning.config import PARTS, Part
from vlmtune.tuning.parts import part_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def digests(model: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """A hash of every parameter as it would be stored in ``dtype``, by name."""
    return {
        name: hashlib.sha256(_bytes(parameter.detach().to(dtype))).hexdigest()
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def changed(
    before: Mapping[str, str], after: Mapping[str, str], facts: FamilyFacts
) -> dict[Part, int]:
    """Number of tensors of each part that differ.

    Raises:
        MergeError: If the two models do not have the same parameters.
    """
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise MergeError(f"the merged model has other parameters than its base, first: {odd[:3]}")
    counts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for name, digest in after.items():
        counts[part_of(name, facts)] += digest != before[name]
    return counts


def require_changed(counts: Mapping[Part, int], trained: Sequence[str]) -> None:
    """Fail where a part was trained and its weights stayed what they were.

    Raises:
        MergeError: Naming the part.
    """
    for part in trained:
        if not counts[cast(Part, part)]:
            raise MergeError(
                f"the {part} part was trained, but no tensor of it differs from the base after the "
                "merge: the training of this part would be lost. Nothing was written"
            )


def untie_head(model: PreTrainedModel) -> None:
    """Give the output layer weights of its own.

    An adapter on an output layer that shares its weights with the embedding would, merged in place,
    change the embedding too.
    """
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def adapts_tied_head(model: PreTrainedModel, adapter_keys: Sequence[str]) -> bool:
    """Whether an adapter sits on an output layer that is tied to the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or head.weight is not embedding.weight:
        return False
    name = next(name for name, module in model.named_modules() if module is head)
    return any(f".{name}.lora_" in key for key in adapter_keys)


def merge_adapter(tuned: Tuned) -> PreTrainedModel:
    """The stock model with the adapters added to its weights, and no adapters left in it."""
    if tuned.adapter is None:
        return tuned.model
    merged: Any = cast(Any, tuned.adapter).merge_and_unload(safe_merge=True)
    return cast("PreTrainedModel", merged)


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().reshape(-1)
