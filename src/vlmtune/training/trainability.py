"""Proof, from the first gradients, that the parts that should train do, and that no other does.

A tower cut off from the graph, or frozen by mistake, looks like any other run: the loss falls, and
what was meant to be trained stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from vlmtune.errors import VlmtuneError
from vlmtune.models.family import FamilyFacts
from vlmtune.tuning.config import PARTS, Part
from vlmtune.tuning.parts import count_parts, part_of, parts_of

SEES = ("vision", "projector")  # parts that get a gradient from images alone


class TrainabilityError(VlmtuneError):
    """A part that should train gets no gradient, or a frozen one does."""

    code = "trainability"


@dataclass(frozen=True)
class PartGradient:
    """What the first gradients say of a part.

    Attributes:
        part: Its name.
        parameters: Number of its weights, adapters included.
        trainable: Number of those that train.
        gradient_norm: Norm of their gradient before clipping; None where nothing trains, or no
            step had an image.
        without_gradient: How many of the tensors that train got no gradient. The first matrix of an
            adapter does not count: it has none as long as the second is zero, as it is at first.
        step: The step that showed it; None if none did.
    """

    part: Part
    parameters: int
    trainable: int
    gradient_norm: float | None = None
    without_gradient: int = 0
    step: int | None = None


class TrainabilityProof:
    """Looks at the gradients of the first steps, until every part has been seen.

    Args:
        model: The model, adapters inside.
        facts: The family's facts.
        parameters: What should train, by name.
    """

    def __init__(
        self, model: nn.Module, facts: FamilyFacts, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._model, self._facts = model, facts
        # By name: what is cut among processes later is other objects, and smaller ones.
        self._sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        self._trained = parts_of(parameters, facts)
        whole = count_parts(model, facts, trainable=False)
        self._rows = {
            part: PartGradient(part, whole[part], self._size(part)) for part in PARTS if whole[part]
        }

    @property
    def complete(self) -> bool:
        """Whether every part has been seen."""
        return all(row.step is not None for row in self._rows.values())

    @property
    def rows(self) -> list[PartGradient]:
        """What is known so far, a row a part."""
        return list(self._rows.values())

    def observe(self, step: int, norms: Mapping[str, float], *, images: bool) -> None:
        """Look at the gradients of a step, before they are clipped.

        Args:
            step: The step's number.
            norms: Norm of the gradient of each parameter that trains and has one, by name.
            images: Whether it had an image; without one, vision tower and projector show nothing.

        Raises:
            TrainabilityError: Naming the part.
        """
        for part, row in self._rows.items():
            if row.step is not None or (part in SEES and not images):
                continue
            strays = self._strays(part)
            if strays:
                raise TrainabilityError(self._stray(part, strays, step))
            if part in self._trained:
                row = self._measured(row, norms)
                if not row.gradient_norm:
                    raise TrainabilityError(self._idle(row, step))
                if not math.isfinite(row.gradient_norm):
                    continue  # an overflow shows nothing; the next step may
            self._rows[part] = replace(row, step=step)

    def _size(self, part: Part) -> int:
        return sum(self._sizes[name] for name in self._of(part))

    def _of(self, part: Part) -> list[str]:
        return [name for name in self._sizes if part_of(name, self._facts) == part]

    def _measured(self, row: PartGradient, norms: Mapping[str, float]) -> PartGradient:
        total, without = 0.0, 0
        for name in self._of(row.part):
            norm = norms.get(name, 0.0)
            total += norm**2
            without += norm == 0 and ".lora_A." not in name
        return replace(row, gradient_norm=math.sqrt(total), without_gradient=without)

    def _strays(self, part: Part) -> list[str]:
        """Tensors of a part that should stay as they are and have a gradient all the same."""
        return [
            name
            for name, parameter in self._model.named_parameters()
            if parameter.grad is not None
            and name not in self._sizes
            and part_of(name, self._facts) == part
        ]

    def _idle(self, row: PartGradient, step: int) -> str:
        names = self._of(row.part)
        frozen = sum(not self._model.get_parameter(name).requires_grad for name in names)
        tensors = len(names)
        cause = (
            f"{frozen} of them do not ask for one (requires_grad is off since the run began)"
            if frozen
            else "their output does not reach the loss: it is detached on the way, or unused"
        )
        return (
            f"the {row.part} part should train ({row.trainable:,} weights in {tensors} tensors), "
            f"and none of its tensors got a gradient in step {step}: {cause}. The step was not "
            f"applied. If the part is meant to stay as it is, set tuning.freeze=[{row.part}]; "
            "otherwise this model cannot train it, and the result would not be what the recipe says"
        )

    def _stray(self, part: Part, strays: Sequence[str], step: int) -> str:
        which = "beside what trains" if part in self._trained else "and the part is frozen"
        return (
            f"{len(strays)} tensors of the {part} part got a gradient in step {step} that should "
            f"stay as they are, {which} (first: {strays[0]}): requires_grad was set after the "
            "recipe's tuning was applied. The step was not applied. If they are meant to train, "
            "name the part in tuning.train, or modules in tuning.modules_to_save"
        )
