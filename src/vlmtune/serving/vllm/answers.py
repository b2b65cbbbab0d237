"""Answering rows for an evaluation with a running vLLM, as ``models.generate`` does in process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from vlmtune.data.conversation import Conversation
from vlmtune.errors import VlmtuneError
from vlmtune.models.encode import Encoder
from vlmtune.models.generate import Generation, tokens_of
from vlmtune.serving.events import Began, Ended, Event, Failed
from vlmtune.serving.front import Front
from vlmtune.serving.rows import Asking
from vlmtune.serving.settings import Settings


class Answers:
    """Calls like ``generate``: rows in, answers in their order.

    Args:
        engine: A started engine.
    """

    def __init__(self, engine: Front) -> None:
        self._engine = engine

    def __call__(
        self,
        _model: Any,
        encoder: Encoder,
        questions: Sequence[Conversation],
        *,
        max_new_tokens: int,
        progress: Callable[[int], None] | None = None,
        **_: Any,
    ) -> list[Generation]:
        """Answer each conversation's last question, greedily.

        Args:
            encoder: The encoder of the model's contract.
            questions: Rows; a last assistant turn is left out.
            max_new_tokens: Longest answer in tokens.
            progress: Called with the number of questions answered so far.

        Raises:
            DataError: Naming a row that the model cannot be asked about.
            ServingError: If vLLM fails on one.
        """
        for row in questions:
            tokens_of(encoder, row, ask=True)
        settings = Settings(max_tokens=max_new_tokens)
        room = threading.Semaphore(self._engine.config.max_waiting)
        said: dict[int, Generation] = {}
        failed: list[VlmtuneError] = []
        asked: list[Asking] = []
        for place, row in enumerate(questions):
            room.acquire()
            if failed:
                room.release()
                break
            hear = _Hearing(place, said, failed, room)
            asked.append(self._engine.submit(row.prompt(), settings, hear))
            if progress is not None:
                progress(len(said))
        for _permit in range(self._engine.config.max_waiting):  # the last, too
            room.acquire()
        if failed:
            for asking in asked:
                asking.cancel()
            raise failed[0]
        if progress is not None:
            progress(len(said))
        return [said[place] for place in range(len(questions))]


class _Hearing:
    """Hears one answer, on the engine's threads."""

    def __init__(
        self,
        place: int,
        said: dict[int, Generation],
        failed: list[VlmtuneError],
        room: threading.Semaphore,
    ) -> None:
        self._place, self._said, self._failed, self._room = place, said, failed, room
        self._prompt_tokens = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Failed):
            self._failed.append(event.error)
            self._room.release()
        elif isinstance(event, Ended):
            self._said[self._place] = Generation(
                text=event.text,
                boxes=event.boxes,
                prompt_tokens=self._prompt_tokens,
                completion_tokens=event.completion_tokens,
                finished=event.finish_reason == "stop",
            )
            self._room.release()
        elif isinstance(event, Began):
            self._prompt_tokens = event.prompt_tokens
