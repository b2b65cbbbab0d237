"""What is measured on the probe while a run trains, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vlmtune.batching.collate import PackedBatch
from vlmtune.runs.best import PROBE_LOSS
from vlmtune.training.checkpoint import State


@dataclass(frozen=True)
class Watch:
    """Measurements on fixed rows, the best of them, and when to stop for want of a better one.

    Attributes:
        batches: This process's batches for the loss; None: it is not measured.
        loss_every: Steps between two measurements of the loss.
        answers: Asks the model the rows' questions after a step: values by metric, alike in all
            processes; None: it is not asked.
        answers_every: Steps between two times of asking.
        best_by: ``probe_loss`` or a metric: what the best step is best by.
        rising: Whether more of it is better.
        keeps_best: Whether each best step so far is saved, and not only measured.
        stop_after: Its measurements in a row without a better one, after which the training ends;
            None: it does not.
    """

    batches: Sequence[PackedBatch] | None = None
    loss_every: int = 100
    answers: Callable[[int], Mapping[str, float]] | None = None
    answers_every: int = 100
    best_by: str = PROBE_LOSS
    rising: bool = False
    keeps_best: bool = False
    stop_after: int | None = None

    def judge(self, state: State, value: float) -> None:
        """Note a measurement of ``best_by`` after the state's step."""
        if state.best_by != self.best_by:  # values of another metric say nothing of this one's
            state.best_by, state.best_step, state.best_value = self.best_by, None, None
            state.without_gain = 0
        best = state.best_value
        better = best is None or (value > best if self.rising else value < best)
        if better and math.isfinite(value):
            state.best_step, state.best_value, state.without_gain = state.step, value, 0
        else:
            state.without_gain += 1

    def is_over(self, state: State) -> bool:
        """Whether the training ends here, before the plan does."""
        if self.stop_after is None or state.best_by != self.best_by:
            return False
        return state.without_gain >= self.stop_after
