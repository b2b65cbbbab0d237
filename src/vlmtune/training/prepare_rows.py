"""From a split to a plan: lengths from headers, and an account of every row that is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlmtune.batching.planner import Plan, make_plan
from vlmtune.data.answers import Answers, acceptable_answers, answering
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


@dataclass(frozen=True)
class Measured:
    """A split, as far as a plan needs to know it.

    Attributes:
        lengths: Tokens of each row, with the longest answer that it may be trained on.
        choices: How many answers each row may be trained on; None: only the one in it.
        unusable: Rows that the family cannot take.
        packs: Whether rows may share a forward; else each takes one of its own.
    """

    lengths: list[int]
    choices: list[int] | None
    unusable: list[Dropped]
    packs: bool = True


def measure(
    rows: Sequence[Conversation],
    encoder: Encoder,
    progress: Callable[[int, int], None],
    answers: Answers = "fixed",
) -> Measured:
    """Tokens of every row, and the rows that the family cannot take.

    Args:
        rows: The split.
        encoder: The model's encoder.
        progress: Called with (rows so far, all rows).
        answers: Whether each row is trained on its own answer, or on one drawn of all.
    """
    lengths, choices, unusable = [], [], []
    for index, row in enumerate(rows):
        others = acceptable_answers(row) if answers == "drawn" else ()
        choices.append(len(others))
        try:
            spoken = [answering(row, text) for text in others] if len(others) > 1 else [row]
            lengths.append(max(len(encoder.tokens(each)) for each in spoken))
        except DataError as error:
            lengths.append(UNUSABLE)
            unusable.append(Dropped(row.id, error.code, str(error)))
        progress(index + 1, len(rows))
    drawn = choices if answers == "drawn" else None
    return Measured(lengths, drawn, unusable, encoder.family.facts.packs)


def plan_rows(
    rows: Rows,
    measured: Measured,
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
    lengths, choices = measured.lengths, measured.choices
    plan = make_plan(
        lengths,
        batch_size=config.batch_size,
        epochs=config.epochs,
        max_steps=config.max_steps,
        max_length=max_length,
        token_budget=token_budget if measured.packs else 1,  # less than any row: none fits beside
        seed=config.seed,
    )
    if choices is not None:
        plan = replace(plan, choices=np.array(choices, dtype=np.int64))
    dropped = [
        Dropped(
            rows.ids[index],
            "too_long",
            f"{length} tokens{_with(choices, index)}, data.max_length is {max_length}",
        )
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


def _with(choices: Sequence[int] | None, index: int) -> str:
    """What a row's length counts, where that is not plain."""
    return " with its longest answer" if choices is not None and choices[index] > 1 else ""
