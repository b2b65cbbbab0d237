"""Which rows make which step, and how a step is cut into forwards.

The plan is made once, from lengths alone, and depends on nothing but its arguments: a resumed run
continues the same plan. How a step is cut into packs changes neither which rows it holds nor their
order of magnitude in the result: the loss is normalised over the whole step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlmtune.data.answers import drawn_answer


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step.

    Attributes:
        number: Counted from 1.
        rows: Indices of its rows, in the seeded order.
        packs: The same indices, cut into forwards.
        answers: Where answers are drawn: which of its acceptable ones each row is trained on, in
            the order of ``rows``; None for a row with no choice. Else empty.
    """

    number: int
    rows: tuple[int, ...]
    packs: tuple[tuple[int, ...], ...]
    answers: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All steps of a run.

    Attributes:
        lengths: Tokens of each row of the split, with the longest of its answers, ``(rows,)``.
        kept: Indices of the rows that are trained; the rest is too long.
        batch_size: Rows per optimizer step.
        samples: Rows to train in all, every epoch counted.
        token_budget: Most tokens of one pack; a longer row stands alone.
        seed: Seed of the order, and of the answers that are drawn.
        choices: Acceptable answers of each row, ``(rows,)``, where they are drawn; None: each row
            is trained on the answer that stands in it.
        visual: Visual tokens of each row, ``(rows,)``; None where nobody asks.
    """

    lengths: np.ndarray
    kept: np.ndarray
    batch_size: int
    samples: int
    token_budget: int
    seed: int
    choices: np.ndarray | None = None
    visual: np.ndarray | None = None

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return math.ceil(self.samples / self.batch_size)

    def step(self, number: int) -> Step:
        """The step of a number, counted from 1."""
        start = (number - 1) * self.batch_size
        stop = min(start + self.batch_size, self.samples)
        rows = tuple(self._at(position) for position in range(start, stop))
        packs = pack_indices(rows, self.lengths, self.token_budget)
        return Step(number, rows, packs, self._answers(number, rows))

    def __iter__(self) -> Iterator[Step]:
        return (self.step(number) for number in range(1, self.steps + 1))

    def _answers(self, number: int, rows: Sequence[int]) -> tuple[int | None, ...]:
        if self.choices is None:
            return ()
        counts = [int(self.choices[row]) for row in rows]
        return tuple(
            drawn_answer(self.seed, number, row, count) if count > 1 else None
            for row, count in zip(rows, counts, strict=True)
        )

    def _at(self, position: int) -> int:
        """The row at a position of the stream of all epochs, each a seeded permutation."""
        epoch, place = divmod(position, len(self.kept))
        return int(self.kept[self._order(epoch)[place]])

    def _order(self, epoch: int) -> np.ndarray:
        memo = self.__dict__.setdefault("_orders", {})
        if epoch not in memo:
            memo.clear()  # one epoch at a time is enough: steps are asked for in order
            memo[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.kept))
        return memo[epoch]

    def fingerprint(self) -> str:
        """A hash of everything that decides the plan but the token budget."""
        digest = hashlib.sha256()
        digest.update(self.lengths.tobytes())
        digest.update(self.kept.tobytes())
        digest.update(f"{self.batch_size},{self.samples},{self.seed}".encode())
        if self.choices is not None:
            digest.update(self.choices.tobytes())
        return digest.hexdigest()


def pack_indices(
    rows: Sequence[int], lengths: Sequence[int] | np.ndarray, token_budget: int
) -> tuple[tuple[int, ...], ...]:
    """First-fit decreasing; ties keep the given order.

    Args:
        rows: Indices into ``lengths``.
        lengths: Tokens of each row.
        token_budget: Most tokens of one pack; a longer row stands alone.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -int(lengths[row])):
        length = int(lengths[row])
        for index, free in enumerate(room):
            if length <= free:
                packs[index].append(row)
                room[index] -= length
                break
        else:
            packs.append([row])
            room.append(token_budget - length)
    return tuple(tuple(pack) for pack in packs)


def make_plan(
    lengths: Sequence[int],
    *,
    batch_size: int,
    epochs: float,
    max_steps: int | None,
    max_length: int,
    token_budget: int,
    seed: int,
) -> Plan:
    """Plan a run.

    Args:
        lengths: Tokens of each row of the split.
        batch_size: Rows per optimizer step.
        epochs: Times each row is trained; a fraction stops within an epoch.
        max_steps: Optimizer steps instead of epochs, if given.
        max_length: Longer rows are left out; they are never cut.
        token_budget: Most tokens of one forward.
        seed: Seed of the order.
    """
    array = np.array(lengths, dtype=np.int64)
    kept = np.flatnonzero(array <= max_length)
    samples = max_steps * batch_size if max_steps is not None else round(epochs * len(kept))
    return Plan(
        lengths=array,
        kept=kept,
        batch_size=batch_size,
        samples=samples if len(kept) else 0,
        token_budget=token_budget,
        seed=seed,
    )
