"""A run's measurements: before training, on its way and after it, by all its processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmtune.batching.planner import Plan
from vlmtune.data.conversation import Conversation
from vlmtune.data.dataset import Rows
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.run import Evaluation, check_rows, evaluate_rows
from vlmtune.models.encode import Encoder
from vlmtune.recipe import Recipe
from vlmtune.runs.best import PROBE_LOSS
from vlmtune.runs.folder import RunFolder
from vlmtune.training.distributed.answering import Together
from vlmtune.training.distributed.ranks import Ranks
from vlmtune.training.distributed.strategy import Strategy
from vlmtune.training.optim import autocast
from vlmtune.training.probe import probe_batches
from vlmtune.training.tracking.trackers import Trackers
from vlmtune.training.watching import Watch
from vlmtune.verbs.holding import shards
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.start import place_of
from vlmtune.verbs.tracked import track_evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Measuring:
    """Asks the model of a run; the first process writes what it said.

    Attributes:
        recipe: The run's.
        folder: The run's.
        validation: The rows that it is measured on.
        ranks: The processes.
        observer: Who is told how it goes.
        trackers: Who is shown the results.
    """

    recipe: Recipe
    folder: RunFolder
    validation: Rows
    ranks: Ranks
    observer: Observer
    trackers: Trackers

    def evaluate(self, when: str, step: int, model: PreTrainedModel, encoder: Encoder) -> None:
        """Measure with all processes, unless it was done before."""
        done = Evaluation.read(self.folder.evaluation(when)) if self.ranks.first else None
        if not self.ranks.any(done is not None):
            self.observer.stage(f"evaluating {when}")
            rows = self.validation[: self.recipe.evaluation.limit]
            done = self._answered(model, encoder, rows, self.observer.progress)
            if self.ranks.first:
                done.write(self.folder.evaluation(when))
        if done is not None and self.ranks.first:
            track_evaluation(self.trackers, self.recipe, step, done, self.validation)

    def watch(
        self, model: PreTrainedModel, strategy: Strategy, encoder: Encoder, plan: Plan
    ) -> Watch:
        """What is measured during training: the probe's loss, and its answers if asked for.

        Raises:
            UsageError: A metric cannot be taken of the probe.
            DataError: A metric cannot be taken of the probe.
        """
        config, rows = self.recipe.evaluation, self.validation[: self.recipe.evaluation.probe]

        def answers(step: int) -> dict[str, float]:
            found = self._answered(model, encoder, rows)
            if self.ranks.first:
                found.write(self.folder.evaluation(f"step-{step:06d}"))
                track_evaluation(
                    self.trackers, self.recipe, step, found, self.validation, heading="probe"
                )
            values = {name: estimate.value for name, estimate in found.metrics.items()}
            # What is decided by them must be decided alike.
            of_first: dict[str, float] = self.ranks.gather_json(values)[0]
            return of_first

        asks = config.generate_every is not None and bool(rows)
        if asks:  # a metric that they cannot have is told now, and not after the first steps
            check_rows(encoder, rows, config.metrics, config.normalise)
        best_by = config.best_by or PROBE_LOSS
        return Watch(
            batches=probe_batches(
                rows, encoder, plan.token_budget, self.ranks, in_step=strategy.in_step
            ),
            loss_every=config.every or self.recipe.training.save_steps,
            answers=answers if asks else None,
            answers_every=config.generate_every or 1,
            best_by=best_by,
            rising=best_by != PROBE_LOSS and find(best_by).higher_is_better,
            keeps_best=config.best_by is not None,
            stop_after=config.stop_after,
        )

    def _answered(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        rows: Sequence[Conversation],
        progress: Callable[[int, int], None] | None = None,
    ) -> Evaluation:
        config = self.recipe.evaluation
        with autocast(self.recipe.training, place_of(self.recipe)[0]):
            return evaluate_rows(
                model,
                encoder,
                rows,
                config.metrics,
                max_new_tokens=config.max_new_tokens,
                batch_rows=config.batch_rows,
                normalise=config.normalise,
                progress=None if progress is None else lambda done: progress(done, len(rows)),
                answer=Together(self.ranks, in_step=shards(self.recipe, self.ranks)),
            )
