"""Vision tower, projector, language model: whose is a parameter?"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from vlmtune.errors import ModelError
from vlmtune.models.family import FamilyFacts
from vlmtune.tuning.config import PARTS, Part


def part_of(name: str, facts: FamilyFacts) -> Part:
    """The part of a model that a parameter belongs to, by its name.

    Raises:
        ModelError: If the family's facts do not cover it.
    """
    if _under(name, facts.projector):  # first: it may lie inside the tower
        return "projector"
    if _under(name, (facts.vision_tower,)):
        return "vision"
    if _under(name, facts.language_model):
        return "language"
    raise ModelError(
        f"parameter {name!r} belongs to no part that the family {facts.name!r} names; its "
        "facts are incomplete for this model"
    )


def count_parts(model: nn.Module, facts: FamilyFacts, *, trainable: bool) -> dict[Part, int]:
    """Number of parameters of each part; only the trainable ones if asked."""
    counts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable:
            counts[part_of(name, facts)] += parameter.numel()
    return counts


def _under(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
