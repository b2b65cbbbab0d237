"""What a step's time goes to: data, vision, language, loss, backward, optimizer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vlmtune.models.family import FamilyFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("data", "vision", "language", "loss", "backward", "optimizer")


@dataclass
class Clock:
    """Knows at each moment which part is being worked on; outside of a step it rests.

    On a GPU the marks are events in its queue, read when the step is done: nothing waits for them.

    Attributes:
        device: Where the model computes.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _marks: list[tuple[str, Any]] = field(default_factory=list, init=False)
    _runs: bool = field(default=False, init=False)

    @contextmanager
    def watching(self, model: PreTrainedModel, facts: FamilyFacts) -> Iterator[None]:
        """Hooks on vision tower and output layer, for as long as a run lasts."""
        tower, head = model.get_submodule(facts.vision_tower), model.get_output_embeddings()
        handles = [
            tower.register_forward_pre_hook(lambda *_: self.mark("vision")),
            tower.register_forward_hook(lambda *_: self.mark("language")),
        ]
        if head is not None:
            handles.append(head.register_forward_pre_hook(lambda *_: self.mark("loss")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self) -> None:
        """A step begins, with its first forward."""
        self._marks.clear()
        self._runs = True
        self.mark("language")

    def mark(self, part: str) -> None:
        """From now on it is this part's time."""
        if not self._runs:
            return
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def end(self, data: float) -> dict[str, float]:
        """The step is done.

        Args:
            data: Seconds that were waited for its batches.

        Returns:
            Seconds of each part.
        """
        self.mark("end")
        self._runs = False
        if self.device.type == "cuda":
            self._marks[-1][1].synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        seconds["data"] = data
        for (part, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            spent = start.elapsed_time(stop) / 1e3 if self.device.type == "cuda" else stop - start
            seconds[part] += spent
        return {part: round(value, 6) for part, value in seconds.items()}
