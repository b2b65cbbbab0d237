"""From a split to a plan: lengths from headers, and an account of every row that is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmtune.batching.planner import Plan, make_plan
from vlmtune.data.conversation import Conversation
from vlmtune.data.dataset import Rows
from vlmtune.errors import DataError, RefusedError
from vlmtune.models.encode import Encoder
from vlmtune.training.config import TrainingConfig

UNUSABLE = 2**62  # longer than any limit: such a row never enters a plan


@dataclass(frozen=True)
class Dropped:
    """A row that is not trained.

    Attributes:
        id: The row's id.
        code: Why.
        message: Why, in words.
    """

    id: str
    code: str
    message: str


def measure(
    rows: Sequence[Conversation], encoder: Encoder, progress: Callable[[int, int], None]
) -> tuple[list[int], list[Dropped]]:
    """Tokens of every row, and the rows that the family cannot take."""
    lengths, dropped = [], []
    for index, row in enumerate(rows):
        try:
            lengths.append(len(encoder.tokens(row)))
        except DataError as error:
            lengths.append(UNUSABLE)
            dropped.append(Dropped(row.id, error.code, str(error)))
        progress(index + 1, len(rows))
    return lengths, dropped


def plan_rows(
    rows: Rows,
    lengths: Sequence[int],
    config: TrainingConfig,
    *,
    max_length: int,
    too_long: str,
    token_budget: int,
) -> tuple[Plan, list[Dropped]]:
    """Plan a run over measured rows.

    Raises:
        RefusedError: If no row is left, or ``too_long`` is ``error`` and one is.
    """
    plan = make_plan(
        lengths,
        batch_size=config.batch_size,
        epochs=config.epochs,
        max_steps=config.max_steps,
        max_length=max_length,
        token_budget=token_budget,
        seed=config.seed,
    )
    dropped = [
        Dropped(rows.ids[index], "too_long", f"{length} tokens, data.max_length is {max_length}")
        for index, length in enumerate(lengths)
        if max_length < length < UNUSABLE
    ]
    if dropped and too_long == "error":
        first = dropped[0]
        raise RefusedError(
            f"{len(dropped)} rows are too long (first: {first.id}, {first.message}). Raise "
            "data.max_length, lower image.max_pixels, or leave them out with data.too_long=drop"
        )
    if plan.steps == 0:
        raise RefusedError(
            f"no row of the train split can be trained: {len(lengths)} rows, {len(dropped)} too "
            f"long for data.max_length={max_length}. Run `vlmtune check` on the data"
        )
    return plan, dropped
