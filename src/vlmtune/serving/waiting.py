"""Questions before the model has read them: waiting, decoded by other threads, ready."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from vlmtune.errors import DataError, ModelError, VlmtuneError
from vlmtune.serving.errors import BadRequestError, BusyError, TooSlowError, internal
from vlmtune.serving.rows import Asking
from vlmtune.serving.settings import EngineConfig


class Waiting:
    """A queue whose first members are made ready while the model works.

    Args:
        config: How many may wait, and how far ahead is encoded.
        context: See the attribute.

    Attributes:
        changed: Held while the queue changes, and notified after; the engine waits on it.
        ready: Encoded questions, oldest first; only with ``changed`` held.
        context: Most tokens of a question and its answer together, or None.
        seconds_each: How long an answer took lately, for guessing when there will be room.
    """

    def __init__(self, config: EngineConfig, context: int | None) -> None:
        self.changed = threading.Condition()
        self.ready: deque[Asking] = deque()
        self.seconds_each = 1.0
        self._config, self.context = config, context
        self._asked: deque[Asking] = deque()
        self._encoding: list[Asking] = []
        self._pool = ThreadPoolExecutor(config.encoders, "vlmtune encoder")

    def __len__(self) -> int:
        return len(self._asked) + len(self._encoding) + len(self.ready)

    def put(self, asking: Asking) -> None:
        """Let a question wait; with ``changed`` held.

        Raises:
            BusyError: If the queue is full.
        """
        if len(self) >= self._config.max_waiting:
            self.clear_out()
        if len(self) >= self._config.max_waiting:
            seconds = self.seconds_each * len(self) / self._config.batch_rows
            raise BusyError(
                f"{len(self)} questions wait already, no more are taken; ask again later",
                retry_after=min(max(math.ceil(seconds), 1), 60),
            )
        self._asked.append(asking)
        self.encode_ahead()

    def encode_ahead(self) -> None:
        """Give the encoders work, one full batch ahead: pixels are large. With ``changed`` held."""
        while self._asked and len(self._encoding) + len(self.ready) < self._config.batch_rows:
            asking = self._asked.popleft()
            if not asking.over:
                self._encoding.append(asking)
                self._pool.submit(self._encode, asking)

    def clear_out(self) -> None:
        """Forget those whom nobody waits for, or who waited too long; with ``changed`` held."""
        now = time.monotonic()
        for asking in chain(self._asked, self._encoding, self.ready):
            if now > asking.deadline:
                asking.fail(too_slow())
        self._asked = deque(asking for asking in self._asked if not asking.over)
        self.ready = deque(asking for asking in self.ready if not asking.over)

    def give_up(self, error: VlmtuneError) -> None:
        """Tell all of them that there will be no answer; with ``changed`` held."""
        for asking in chain(self._asked, self._encoding, self.ready):
            asking.fail(error)
        self.clear_out()

    def close(self) -> None:
        """Let the encoders end."""
        self._pool.shutdown(cancel_futures=True)

    def _encode(self, asking: Asking) -> None:
        try:
            if asking.question is not None and not asking.over:
                asking.encoded = asking.served.encoder.encode(asking.question, ask=True)
                self._measure(asking)
        except (DataError, ModelError, BadRequestError) as error:
            asking.fail(error)
        except Exception as error:  # noqa: BLE001 - whatever a file does to a decoder
            asking.fail(internal(error))
        with self.changed:
            self._encoding.remove(asking)
            if not asking.over:
                self.ready.append(asking)
            self.encode_ahead()
            self.changed.notify_all()

    def _measure(self, asking: Asking) -> None:
        """How long the answer may become.

        Raises:
            BadRequestError: If question and answer do not fit into the model's context.
        """
        assert asking.encoded is not None
        asking.prompt_tokens = prompt = len(asking.encoded.tokens)
        asked, context = asking.settings.max_tokens, self.context
        asking.max_tokens = asked or self._config.max_new_tokens
        if context is None:
            return
        if prompt >= context or (asked is not None and prompt + asked > context):
            raise BadRequestError(
                f"the model's context is {context} tokens; the messages have {prompt}"
                + (f" and max_tokens asks for {asked}" if asked else "")
                + ". Shorten them, or use fewer or smaller images",
                param="messages" if prompt >= context else "max_tokens",
                code="context_length_exceeded",
            )
        asking.max_tokens = min(asking.max_tokens, context - prompt)


def too_slow() -> TooSlowError:
    """What is told when time is up."""
    return TooSlowError("the answer was not finished in time; ask for fewer tokens, or later")
