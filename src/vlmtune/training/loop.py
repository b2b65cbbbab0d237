"""The one loop: LoRA and full fine-tuning differ in what was done to the model before it.

The loss of a step is the sum over all its label tokens divided by their number, whatever the cut
into forwards; a killed run continues to the same bits.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmtune.batching.collate import PackedBatch
from vlmtune.batching.planner import Plan, Step
from vlmtune.errors import DivergedError, VlmtuneError
from vlmtune.files import append_lines
from vlmtune.models.family import Family
from vlmtune.models.features import FEATURES
from vlmtune.runs.best import PROBE_LOSS
from vlmtune.runs.folder import RunFolder
from vlmtune.training.checkpoint import State
from vlmtune.training.config import TrainingConfig
from vlmtune.training.distributed.ranks import Ranks
from vlmtune.training.distributed.strategy import Strategy
from vlmtune.training.fitting import (
    RandomStates,
    attempt,
    halved,
    is_rehearsed,
    largest,
    room_for_moments,
)
from vlmtune.training.loader import Loader
from vlmtune.training.loss import mean_loss, summed_loss
from vlmtune.training.memory import peak_memory
from vlmtune.training.optim import autocast, learning_rate, set_learning_rates
from vlmtune.training.saving import Saver
from vlmtune.training.signals import stop_signals
from vlmtune.training.timing import Clock
from vlmtune.training.trainability import PartGradient, TrainabilityProof
from vlmtune.training.watching import Watch
from vlmtune.training.writing import write_end, write_proof, write_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PATIENCE = 3  # steps in a row without a finite gradient before the run stops


class StoppedError(VlmtuneError):
    """A signal stopped the run after its checkpoint was written. Exit status 128 + signal."""

    code = "stopped"

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, as it is logged.

    Attributes:
        step: Its number, from 1.
        steps: How many the run has.
        loss: Per-token loss over all labels of the step.
        learning_rate: As it was used.
        gradient_norm: Before clipping.
        applied: False if the step was left out (fp16 overflow, or not finite).
        samples: Rows of the step.
        tokens: Tokens of the step.
        labels: Tokens trained on.
        seconds: What it took, waiting for data included; saving and probing not.
        peak_memory_bytes: Highest memory so far.
        probe_loss: Per-token loss on the probe after the step, where it was measured.
        probe_metrics: Metrics of the probe's answers after the step, where they were asked for.
        parts: Seconds of this process's data, vision, language, loss, backward and optimizer.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    applied: bool
    samples: int
    tokens: int
    labels: int
    seconds: float
    peak_memory_bytes: int
    probe_loss: float | None = None
    probe_metrics: Mapping[str, float] | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


def _silent(report: StepReport) -> None:
    """Report to nobody."""


def _nothing() -> None:
    """Nobody profiles."""


def _unseen(rows: Sequence[PartGradient]) -> None:
    """Show the proof to nobody."""


@dataclass
class Job:
    """All that a run is made of.

    Attributes:
        model: The model, adapters inside, on its device.
        family: Its family.
        strategy: How the processes hold the weights, and move them.
        config: The recipe's ``training``.
        plan: Which rows make which step.
        loader: Makes their batches.
        folder: The run's folder.
        saver: Writes its checkpoints.
        proof: Stops the run where a part that should train gets no gradient, or a frozen one does.
        watch: What is measured during training, and when it ends early.
        state: Where the run stands.
        on_step: Called after every step.
        on_proof: Called once, when the gradients of every part have been seen.
        profile: What the steps run within; called after each.
        clock: Where a step's time goes.
    """

    model: PreTrainedModel
    family: Family
    strategy: Strategy
    config: TrainingConfig
    plan: Plan
    loader: Loader
    folder: RunFolder
    saver: Saver
    proof: TrainabilityProof
    watch: Watch = field(default_factory=Watch)
    state: State = field(default_factory=State)
    on_step: Callable[[StepReport], None] = _silent
    on_proof: Callable[[Sequence[PartGradient]], None] = _unseen
    profile: AbstractContextManager[Callable[[], None]] = field(
        default_factory=lambda: nullcontext(_nothing)
    )
    clock: Clock = field(default_factory=Clock)

    @property
    def ranks(self) -> Ranks:
        """The processes that train together; the first one writes."""
        return self.strategy.ranks


def run(job: Job) -> State:
    """Train from where the state stands to the end of the plan, or until nothing is gained.

    Returns:
        The state after the last step; its checkpoint is written.

    Raises:
        StoppedError: On SIGINT or SIGTERM, after a checkpoint.
        DivergedError: If gradients stop being finite.
        TrainabilityError: If the first gradients are not those of the parts that should train.
        TooLargeError: If a row does not fit into memory, even alone.
    """
    steps, failures = job.plan.steps, 0
    start = steps if job.watch.is_over(job.state) else job.state.step
    job.model.train()
    watched = job.clock.watching(job.model, job.family.facts)
    with stop_signals() as stopped, job.saver, watched, job.profile as profiled:
        if start < steps and is_rehearsed(job.config.rehearse, job.strategy):
            _rehearse(job, start)
        started = time.perf_counter()
        for step, batches in _steps(job, start):
            proving = not job.proof.complete
            report = _train_step(job, step, batches, started)
            scaled = job.strategy.scaler.is_enabled()  # an overflow lowers its scale
            failures = 0 if report.applied or scaled else failures + 1
            if failures == PATIENCE:
                raise _diverged(job, step)
            _account(job, step, report)
            last = step.number == steps
            report = _watched(job, report, last=last)
            last = last or job.watch.is_over(job.state)
            if job.ranks.first:
                write_step(job, step, report)
                if proving and (job.proof.complete or last):
                    write_proof(job, step)
                job.on_step(report)
            profiled()
            job.saver.check()
            # Asked once, and alike everywhere: a later signal is answered after the next save.
            stopping = job.ranks.any(bool(stopped))
            if last or stopping or _is_saved(job):
                job.saver.save(job.state)
            if last or stopping:
                job.saver.wait()
                job.ranks.wait()  # the first process writes; who left now would be missed
            if stopping or (last and stopped):
                raise _stopped(job, stopped[0] if stopped else signal.SIGTERM)
            if last:
                break
            started = time.perf_counter()
    return job.state


def _train_step(job: Job, step: Step, batches: list[PackedBatch], started: float) -> StepReport:
    ranks, strategy = job.ranks, job.strategy
    counts = ranks.total(
        sum(batch.labels for batch in batches), sum(batch.tokens for batch in batches)
    )
    labels, tokens = (int(count) for count in counts)
    waited = time.perf_counter() - started
    job.clock.begin()
    (loss_value,) = ranks.total(_gradients(job, step, batches, labels))
    job.clock.mark("optimizer")
    strategy.add_up()
    if not job.proof.complete:
        images = ranks.any(_have_images(job.family, batches))
        job.proof.observe(step.number, strategy.norms(), images=images)
        if job.proof.complete:
            strategy.stop_watching()
    rate = learning_rate(job.config, step.number, job.plan.steps)
    set_learning_rates(strategy.optimizer, job.config, step.number, job.plan.steps)
    norm_value = strategy.move(job.config.clip, finite=math.isfinite(loss_value))
    return StepReport(
        step=step.number,
        steps=job.plan.steps,
        loss=loss_value,
        learning_rate=rate,
        gradient_norm=norm_value,
        applied=math.isfinite(loss_value) and math.isfinite(norm_value),
        samples=len(step.rows),
        tokens=tokens,
        labels=labels,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory(strategy.device),
        parts=job.clock.end(waited),
    )


def _steps(job: Job, start: int) -> Iterator[tuple[Step, list[PackedBatch]]]:
    """The steps after ``start``; where the budget halves, those made ahead are cut anew."""
    while start < job.plan.steps:
        plan = job.plan
        for step, batches in job.loader.steps(start=start):
            yield step, batches
            start = step.number
            if job.plan is not plan:
                break


def _gradients(job: Job, step: Step, batches: list[PackedBatch], labels: int) -> float:
    """This process's share of the step's gradients, in as many forwards as memory needs."""
    loss = attempt(lambda: float(_backward(job, batches, labels)), job.strategy)
    while loss is None:
        _halve(job, step.number, job.plan.step(step.number).packs)
        smaller = job.loader.batches(job.plan.step(step.number))
        loss = attempt(lambda: float(_backward(job, smaller, labels)), job.strategy)  # noqa: B023
    return loss


def _halve(job: Job, step: int, packs: Sequence[Sequence[int]]) -> None:
    """Go on with half the tokens of a forward; written down, for a resumed run must cut alike."""
    before = job.plan.token_budget
    job.plan = halved(job.plan, packs, job.loader.row_id)
    job.loader.plan = job.plan
    job.state.token_budget = job.plan.token_budget
    if job.ranks.first:
        event = {"step": step, "event": "token_budget", "before": before}
        append_lines(job.folder.ledger, [{**event, "token_budget": job.plan.token_budget}])


def _rehearse(job: Job, start: int) -> None:
    """Pass through the largest forward to come, there and back, and leave everything as it was."""
    random = RandomStates.now()
    while True:
        step, index = largest(job.plan, start)
        batch = job.loader.batch(step, index)
        moments = room_for_moments(job.strategy)
        if attempt(lambda: float(_backward(job, [batch], batch.labels)), job.strategy) is not None:  # noqa: B023
            break
        del moments
        _halve(job, start, [step.packs[index]])
    random.restore()
    job.strategy.optimizer.zero_grad(set_to_none=True)


def _backward(job: Job, batches: Sequence[PackedBatch], labels: int) -> Tensor:
    """This process's share of the gradients of the step's mean loss, and of that loss."""
    device = job.strategy.device
    total = torch.zeros((), device=device)
    for batch in batches:
        job.clock.mark("language")
        with autocast(job.config, device):
            loss = summed_loss(job.strategy.module, job.family, batch.to(device)) / labels
        job.clock.mark("backward")
        job.strategy.backward(loss)
        total += loss.detach()
    return total


def _have_images(family: Family, batches: Sequence[PackedBatch]) -> bool:
    names = (*family.facts.joins, FEATURES)
    return any(name in batch.inputs for batch in batches for name in names)


def _account(job: Job, step: Step, report: StepReport) -> None:
    state = job.state
    state.step = step.number
    state.samples += report.samples
    state.tokens += report.tokens
    state.labels += report.labels
    state.seconds += report.seconds
    state.scaler = job.strategy.scaler.state_dict()


def _watched(job: Job, report: StepReport, *, last: bool) -> StepReport:
    """Measure what is due; training goes on as if it had not been measured."""
    watch, step = job.watch, job.state.step
    if watch.batches is not None and (last or step % watch.loss_every == 0):
        report = replace(report, probe_loss=_probe_loss(job, watch.batches))
    if watch.answers is not None and step % watch.answers_every == 0:
        job.saver.wait()  # it writes settings of the model, which asking changes for a while
        report = replace(report, probe_metrics=watch.answers(step))
    value = (report.probe_metrics or {}).get(watch.best_by)
    value = report.probe_loss if watch.best_by == PROBE_LOSS else value
    if value is not None:
        watch.judge(job.state, value)
        if watch.is_over(job.state) and not last and job.ranks.first:
            write_end(job)
    return report


def _probe_loss(job: Job, batches: Sequence[PackedBatch]) -> float:
    device = job.strategy.device
    job.model.eval()
    with autocast(job.config, device):
        loss = mean_loss(job.model, job.family, [batch.to(device) for batch in batches], job.ranks)
    job.model.train()
    return loss


def _is_saved(job: Job) -> bool:
    """Whether this step has a checkpoint, apart from the last one."""
    step = job.state.step
    is_best = job.watch.keeps_best and job.state.best_step == step
    return is_best or step % job.config.save_steps == 0


def _diverged(job: Job, step: Step) -> DivergedError:
    ids = ", ".join(job.loader.row_id(index) for index in step.rows[:5])
    return DivergedError(
        f"loss or gradients were not finite in {PATIENCE} steps in a row, up to step {step.number} "
        f"(rows {ids} …). Those steps were not applied and the last checkpoint is intact. Lower "
        "training.learning_rate, or try training.precision=fp32"
    )


def _stopped(job: Job, number: int) -> StoppedError:
    name = signal.Signals(number).name
    # After the last step too: what remains (measuring, the report) is done by the resumed run.
    return StoppedError(
        number,
        f"stopped by {name} after step {job.state.step} of {job.plan.steps}; the checkpoint is "
        f"written. Go on with the same command and --resume (--run {job.folder})",
    )
