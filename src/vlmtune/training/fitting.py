"""What fits into memory: a token budget that halves where it does not, and a rehearsal before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vlmtune.batching.planner import Plan, Step
from vlmtune.errors import VlmtuneError
from vlmtune.training.distributed.strategy import Strategy

logger = logging.getLogger(__name__)

REHEARSED = 1000  # steps that are looked through for the largest pack
TOKENS_PER_FORWARD = {"cpu": 1024, "cuda": 4096}
MOMENTS = 2  # numbers that AdamW keeps for each that trains

T = TypeVar("T")


class TooLargeError(VlmtuneError):
    """A row does not fit into memory, even alone."""

    code = "out_of_memory"


@dataclass(frozen=True)
class RandomStates:
    """What dropout draws from, at one moment.

    Attributes:
        cpu: torch's state.
        cuda: That of the current GPU, or None.
    """

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> RandomStates:
        """As they are."""
        gpu = torch.cuda.is_available()
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if gpu else None)

    def restore(self) -> None:
        """As they were."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


def attempt(work: Callable[[], T], strategy: Strategy) -> T | None:
    """Do a step's forwards and backwards, by all processes.

    Returns:
        What the work returned; None where memory ended in any process. Gradients and random states
        are then as before.

    Raises:
        TooLargeError: Where processes that go in step cannot begin the step anew.
    """
    random, done = RandomStates.now(), None
    try:
        done = work()
    except torch.OutOfMemoryError as error:
        if strategy.in_step and strategy.ranks.count > 1:
            raise TooLargeError(
                f"memory ended in process {strategy.ranks.rank}: {_first_line(error)}. Processes "
                "that hold parts of the weights cannot cut a step anew. Set a lower "
                "training.token_budget, or lower image.max_pixels; the last checkpoint is intact"
            ) from error
    # Out of the handler only: until then the error holds the forward's tensors.
    if not strategy.ranks.any(done is None):
        return done
    strategy.optimizer.zero_grad(set_to_none=True)
    random.restore()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def halved(plan: Plan, packs: Sequence[Sequence[int]], names: Callable[[int], str]) -> Plan:
    """The plan with half the tokens of a forward.

    Args:
        plan: The plan.
        packs: What was too much: packs of one step.
        names: Id of a row.

    Raises:
        TooLargeError: If each pack is one row already.
    """
    shared = [_tokens(plan, pack) for pack in packs if len(pack) > 1]
    if not shared:
        pack = max(packs, key=lambda pack: _tokens(plan, pack))
        raise TooLargeError(
            f"row {names(pack[0])} ({_tokens(plan, pack)} tokens) does not fit into memory, even "
            "alone in its forward. Lower image.max_pixels (an image becomes fewer tokens), or "
            "leave such rows out with data.max_length; training.gradient_checkpointing=true, "
            "training.precision=bf16 and tuning.method=qlora need less memory too. No step was "
            "applied by half; the last checkpoint is intact"
        )
    budget = max(1, min(plan.token_budget, max(shared)) // 2)
    logger.warning(
        "memory ended with %d tokens in a forward: from here on at most %d (training.token_budget);"
        " the step is done again, its result does not change",
        max(shared),
        budget,
    )
    return replace(plan, token_budget=budget)


def largest(plan: Plan, start: int) -> tuple[Step, int]:
    """The largest pack of the next steps: its step, and which of its packs.

    Args:
        plan: The plan; it has steps left.
        start: Steps done.
    """
    last = min(plan.steps, start + REHEARSED)
    found = [
        (_tokens(plan, pack), -number, index)
        for number in range(start + 1, last + 1)
        for index, pack in enumerate(plan.step(number).packs)
    ]
    _, number, index = max(found)
    return plan.step(-number), index


def room_for_moments(strategy: Strategy) -> list[Tensor]:
    """As much memory as the optimizer will take in its first step; nothing where it has it."""
    if strategy.optimizer.state:
        return []
    trained = list(strategy.parameters.values())
    return [torch.empty_like(each) for each in trained for _ in range(MOMENTS)]


def is_rehearsed(wanted: bool | None, strategy: Strategy) -> bool:
    """Whether the largest forward is tried before the first step; by default on a GPU."""
    alone = strategy.ranks.count == 1 or not strategy.in_step
    return alone and (strategy.device.type == "cuda" if wanted is None else wanted)


def budgets(stated: int | None, default: int, stored: tuple[int, int] | None) -> tuple[int, int]:
    """Tokens of a forward; a resumed run cuts as before, though memory had halved the budget.

    Args:
        stated: What the recipe says.
        default: What it is where recipe and checkpoint say nothing.
        stored: The checkpoint's budget, and what it was in the beginning.

    Returns:
        The budget, and what it was in the beginning.
    """
    if stored is not None and stated in (None, stored[1]):
        return stored
    return stated or default, stated or default


def _tokens(plan: Plan, pack: Sequence[int]) -> int:
    return int(np.asarray(plan.lengths)[list(pack)].sum())


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", maxsplit=1)[0][:200]
