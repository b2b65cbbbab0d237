"""Who is told how a long job goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmtune.training.loop import StepReport
    from vlmtune.training.trainability import PartGradient


class Observer:
    """Hears nothing; the command line overrides what it shows."""

    def stage(self, text: str) -> None:
        """A part of the job begins."""

    def progress(self, done: int, total: int | None) -> None:
        """So much of the current part is done; ``total`` is None where it is not known."""

    def step(self, report: StepReport) -> None:
        """An optimizer step is done."""

    def trainability(self, rows: Sequence[PartGradient]) -> None:
        """The gradients of every part have been seen; a part a row."""
