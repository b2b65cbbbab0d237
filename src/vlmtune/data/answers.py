"""Rows with several acceptable answers: which of them may be trained on, and the row with one."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

from vlmtune.data.build import draw
from vlmtune.data.conversation import Conversation, Message, Text

Answers: TypeAlias = Literal["fixed", "drawn"]


def acceptable_answers(row: Conversation) -> tuple[str, ...]:
    """What a row may be trained on instead of the answer that stands in it.

    Its references, blank ones left out. Empty where its last turn is no answer, or one with boxes:
    references are texts, and none of them is the same answer.
    """
    last = row.messages[-1] if row.messages else None
    if last is None or last.role != "assistant":
        return ()
    if not all(isinstance(part, Text) for part in last.content):
        return ()
    return tuple(text for text in row.references if text.strip())


def answering(row: Conversation, answer: str) -> Conversation:
    """The row with another text as its last answer."""
    return replace(row, messages=(*row.messages[:-1], Message("assistant", (Text(answer),))))


def drawn_answer(seed: int, step: int, row: int, count: int) -> int:
    """Which of ``count`` answers of a row is trained in a step: the same wherever it is asked.

    Args:
        seed: The run's.
        step: The optimizer step, from 1.
        row: The row's place in its split.
        count: How many answers it has, at least 1.
    """
    return draw(seed, f"answer:{step}:{row}") % count
