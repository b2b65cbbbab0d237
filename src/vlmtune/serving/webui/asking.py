"""Asking one model, or two beside each other, and following both answers at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

from vlmtune.errors import VlmtuneError
from vlmtune.serving.engine import Engine
from vlmtune.serving.events import Began, Delta, Ended, Event, Failed
from vlmtune.serving.rows import Asking
from vlmtune.serving.served import ServedModel
from vlmtune.serving.settings import Settings
from vlmtune.serving.webui.history import History, Reply
from vlmtune.serving.webui.pictures import Pictures

EVERY = 0.08  # seconds between two pictures of growing answers: more would only busy the browser

Events = SimpleQueue[tuple[int, Event]]


@dataclass(frozen=True)
class Side:
    """A model that is asked.

    Attributes:
        name: What visitors read.
        engine: What answers; two sides may share one.
        model: Which of its models.
    """

    name: str
    engine: Engine
    model: ServedModel


class Panel:
    """The models that every question goes to; the first one's contract completes the question.

    Args:
        sides: One, or two beside each other.
        pictures: Draws boxes.
    """

    def __init__(self, sides: Sequence[Side], pictures: Pictures) -> None:
        self.sides = tuple(sides)
        self._pictures = pictures

    def answers(self, history: History, settings: Settings) -> Iterator[None]:
        """Let all models answer the last question; the replies stand in the history.

        Args:
            history: Who asks.
            settings: How to answer.

        Yields:
            Whenever there is more to show. It ends when all answers do, or when the history has
            another last question; left off early, it cancels them.
        """
        run, turn = history.run, history.turns[-1]
        replies = turn.replies = [Reply() for _ in self.sides]
        events: Events = SimpleQueue()
        started = time.monotonic()
        askings = [self._ask(side, history, settings, events) for side in range(len(self.sides))]
        try:
            while any(reply.state == "speaking" for reply in replies):
                yield None
                for side, event in _wait(events):
                    self._take(history, side, event, replies[side])
                    replies[side].seconds = time.monotonic() - started
                if history.run != run:
                    return
        finally:
            for asking, reply in zip(askings, replies, strict=True):
                if reply.state == "speaking":
                    reply.state = "stopped"
                if asking is not None:
                    asking.cancel()

    def _ask(
        self, side: int, history: History, settings: Settings, events: Events
    ) -> Asking | None:
        chosen = self.sides[side]
        question = self.sides[0].model.encoder.complete(history.question(side))
        sink = partial(_put, events, side)
        try:
            return chosen.engine.submit(question, settings, sink, model=chosen.model.name)
        except VlmtuneError as error:
            sink(Failed(error))
            return None

    def _take(self, history: History, side: int, event: Event, reply: Reply) -> None:
        if isinstance(event, Began):
            reply.prompt_tokens = event.prompt_tokens
        elif isinstance(event, Delta):
            reply.text += event.text
        elif isinstance(event, Ended):
            reply.text, reply.boxes = event.text, event.boxes
            reply.tokens = event.completion_tokens
            reply.drawn = self._pictures.draw(event.boxes, history.shown_to(side))
            reply.state = "length" if event.finish_reason == "length" else "done"
        else:
            reply.state, reply.fault = "failed", str(event.error)


def _put(events: Events, side: int, event: Event) -> None:
    events.put((side, event))


def _wait(events: Events) -> list[tuple[int, Event]]:
    """What came within ``EVERY``; may be nothing."""
    found = []
    until = time.monotonic() + EVERY
    while (left := until - time.monotonic()) > 0:
        try:
            found.append(events.get(timeout=left))
        except Empty:
            break
        if not isinstance(found[-1][1], Delta):
            break
    while not events.empty():
        found.append(events.get())
    return found
