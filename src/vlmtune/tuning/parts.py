"""Vision tower, projector, language model: whose is a parameter?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from vlmtune.errors import ModelError
from vlmtune.models.family import FamilyFacts
from vlmtune.models.gptq import packed_sizes
from vlmtune.models.quantize import numel, within
from vlmtune.tuning.config import PARTS, LearningRates, Part


def part_of(name: str, facts: FamilyFacts) -> Part:
    """The part of a model that a parameter belongs to, by its name.

    Raises:
        ModelError: If the family's facts do not cover it.
    """
    if within(name, facts.projector):  # first: it may lie inside the tower
        return "projector"
    if within(name, (facts.vision_tower,)):
        return "vision"
    if within(name, facts.language_model):
        return "language"
    raise ModelError(
        f"parameter {name!r} belongs to no part that the family {facts.name!r} names; its "
        "facts are incomplete for this model"
    )


def parts_of(names: Iterable[str], facts: FamilyFacts) -> tuple[Part, ...]:
    """The parts that parameters belong to, in the order of ``PARTS``."""
    found = {part_of(name, facts) for name in names}
    return tuple(part for part in PARTS if part in found)


def count_parts(model: nn.Module, facts: FamilyFacts, *, trainable: bool) -> dict[Part, int]:
    """Number of weights of each part; only the trainable ones if asked."""
    counts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable:
            counts[part_of(name, facts)] += numel(parameter)
    if not trainable:
        for name, size in packed_sizes(model).items():
            counts[part_of(name, facts)] += size
    return counts


def learning_rates(
    names: Iterable[str], rates: LearningRates, facts: FamilyFacts, default: float
) -> Mapping[str, float]:
    """The highest learning rate of each parameter, by name."""
    own = rates.named()
    return {name: own.get(part_of(name, facts), default) for name in names}
