"""What stands before the model: a queue, and the words that any engine is asked in.

The API, the chat page and the terminal know engines by this.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from queue import SimpleQueue

from vlmtune.data.conversation import Conversation
from vlmtune.serving.errors import BadRequestError, OverloadedError
from vlmtune.serving.events import Ended, Event, Failed
from vlmtune.serving.metrics import Metrics
from vlmtune.serving.rows import Answer, Asking, Sink
from vlmtune.serving.served import Catalogue
from vlmtune.serving.settings import EngineConfig, Settings
from vlmtune.serving.waiting import Waiting

PLAIN = Settings()
FATAL = "the model does not work any more; the server has to be started again"
CLOSING = "the server is going down; ask again later"
NOT_RUNNING = "the engine is not running"


class Front(ABC):
    """Takes questions, lets them wait and be encoded; who inherits answers them.

    Args:
        served: The names that it answers under.
        config: How many at once.
        context: Most tokens of a question and its answer together, or None.
        metrics: Where figures go.
    """

    def __init__(
        self,
        served: Catalogue,
        config: EngineConfig | None,
        context: int | None,
        metrics: Metrics | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.metrics = metrics or Metrics()
        self._catalogue = served
        self._waiting = Waiting(self.config, context)
        self._changed = self._waiting.changed
        self.metrics.gauge("waiting", "Questions that wait for their turn.", lambda: self.waiting)
        self.metrics.gauge("running", "Answers that are being spoken.", lambda: self.running)

    @property
    def served(self) -> Catalogue:
        """The names that it answers under."""
        return self._catalogue

    @abstractmethod
    def start(self) -> None:
        """Make sure that the model answers, and begin."""

    @abstractmethod
    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more questions, finish those that are there as far as time allows, and end."""

    @property
    @abstractmethod
    def running(self) -> int:
        """Answers that are being spoken."""

    @property
    @abstractmethod
    def fault(self) -> str | None:
        """Why it does not answer; None while it does."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether no question is taken any more."""

    @property
    def waiting(self) -> int:
        """Questions that wait for their turn."""
        return len(self._waiting)

    def ask(
        self, question: Conversation, settings: Settings = PLAIN, *, model: str | None = None
    ) -> Answer:
        """Ask, and iterate over the events of the answer.

        Args:
            question: A conversation that ends with a user's turn.
            settings: How to answer.
            model: Which model; None takes the first.

        Raises:
            UnknownModelError: If there is no such model.
            BadRequestError: If more answers are asked for than are ever spoken at once.
            BusyError: If the queue is full.
            OverloadedError: If the engine is not answering.
        """
        events: SimpleQueue[Event] = SimpleQueue()
        return Answer(self.submit(question, settings, events.put, model=model), events)

    def submit(
        self, question: Conversation, settings: Settings, sink: Sink, *, model: str | None = None
    ) -> Asking:
        """As ``ask``, but the events go to ``sink``, from the engine's threads; it must not block.

        The last event is ``Failed``, or the ``Ended`` of the last answer.
        """
        served = self.served.named(model)
        if settings.n > self.config.batch_rows:
            raise BadRequestError(
                f"n: found {settings.n}, expected at most {self.config.batch_rows}", param="n"
            )

        def counted(event: Event) -> None:
            self._count(asking, event)
            sink(event)

        asking = Asking(question, settings, served, counted, self.config.request_seconds)
        with self._changed:
            if self.closed:
                raise OverloadedError(self.fault or FATAL)
            self._waiting.put(asking)
        return asking

    def _count(self, asking: Asking, event: Event) -> None:
        if isinstance(event, Failed):
            self.metrics.add("answers", finish_reason="failed")
        elif isinstance(event, Ended):
            self.metrics.add("answers", finish_reason=event.finish_reason)
            self.metrics.add("completion_tokens", event.completion_tokens)
            seconds = time.monotonic() - asking.asked
            self.metrics.observe("answer_seconds", seconds)
            self._waiting.seconds_each += 0.1 * (seconds - self._waiting.seconds_each)
