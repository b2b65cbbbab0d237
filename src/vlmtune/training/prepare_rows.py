"""From a split to a plan: lengths from headers, and an account of every row that is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from vlmtune.batching.planner import Plan, make_plan
from vlmtune.data.answers import Answers, acceptable_answers, answering
from vlmtune.data.conversation import Conversation
from vlmtune.data.dataset import Rows
from vlmtune.errors import DataError, RefusedError
from vlmtune.models.encode import Encoder
from vlmtune.training.config import TrainingConfig
from vlmtune.training.distributed.ranks import Ranks

T = TypeVar("T")
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
        visual: Visual tokens of each row.
    """

    lengths: list[int]
    choices: list[int] | None
    unusable: list[Dropped]
    packs: bool = True
    visual: list[int] | None = None


# Of every row of a process: length, answers, visual tokens; and the rows it refuses.
_Hand = tuple[list[int], list[int], list[int], list[tuple[int, str, str, str]]]


@dataclass(frozen=True, slots=True)
class _Row:
    """What is known of one row. ``unusable`` holds code and message where the family refuses it."""

    length: int
    choices: int
    visual: int
    unusable: tuple[str, str, str] | None = None


def measure(
    rows: Sequence[Conversation],
    encoder: Encoder,
    progress: Callable[[int, int], None],
    answers: Answers = "fixed",
    ranks: Ranks | None = None,
) -> Measured:
    """Tokens of every row, and the rows that the family cannot take.

    Several processes measure each row once among them, and tell each other.

    Args:
        rows: The split.
        encoder: The model's encoder.
        progress: Called with (rows so far, all rows).
        answers: Whether each row is trained on its own answer, or on one drawn of all.
        ranks: The processes; all of them call.
    """
    ranks = ranks or Ranks()
    # Plain lists, and no object a row: there may be a million.
    own: _Hand = ([], [], [], [])
    lengths, choices, visual, unusable = own
    for index in range(ranks.rank, len(rows), ranks.count):
        row = _measured(rows[index], encoder, answers)
        lengths.append(row.length)
        choices.append(row.choices)
        visual.append(row.visual)
        if row.unusable is not None:
            unusable.append((index, *row.unusable))
        progress(min(index + ranks.count, len(rows)), len(rows))
    hands: list[_Hand] = ranks.gather_json(own)
    found = sorted(each for hand in hands for each in hand[3])
    return Measured(
        lengths=_in_order([hand[0] for hand in hands]),
        choices=_in_order([hand[1] for hand in hands]) if answers == "drawn" else None,
        unusable=[Dropped(row_id, code, message) for _, row_id, code, message in found],
        packs=encoder.family.facts.packs,
        visual=_in_order([hand[2] for hand in hands]),
    )


def _in_order(hands: list[list[T]]) -> list[T]:
    """What the processes found of every row, each of its own, dealt out in turn."""
    if len(hands) == 1:
        return hands[0]
    merged = [each for hand in hands for each in hand]  # as long as it has to be
    for rank, hand in enumerate(hands):
        merged[rank :: len(hands)] = hand
    return merged


def _measured(row: Conversation, encoder: Encoder, answers: Answers) -> _Row:
    others = acceptable_answers(row) if answers == "drawn" else ()
    try:
        spoken = [answering(row, text) for text in others] if len(others) > 1 else [row]
        tokens = max((encoder.tokens(each) for each in spoken), key=len)
    except DataError as error:
        refused = (row.id, error.code, str(error))
        return _Row(UNUSABLE, len(others), 0, refused)
    return _Row(len(tokens), len(others), tokens.visual)


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
    if measured.visual is not None:
        plan = replace(plan, visual=np.array(measured.visual, dtype=np.int64))
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
