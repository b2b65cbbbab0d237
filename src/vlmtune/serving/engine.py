"""The engine: one thread has the model, and speaks all answers together, one token a step.

A new question is decoded and made into tokens by other threads while the model works, read in one
forward with others, and joins the answers that are running; whoever is answered or gone leaves.
Each sees the same logits as if it were alone, up to the last bits of the arithmetic.

Where caches cannot be joined (attention with a window, another adapter, too much padding) there are
several batches, which take turns. A family that we cannot decode is asked one question at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from itertools import combinations

import torch

from vlmtune.data.conversation import Conversation, Message, Text
from vlmtune.errors import ModelError, VlmtuneError
from vlmtune.serving.batches import AHEAD, Batch, answer_alone
from vlmtune.serving.errors import OverloadedError, internal
from vlmtune.serving.events import Ended, Event
from vlmtune.serving.front import CLOSING, FATAL, NOT_RUNNING, Front
from vlmtune.serving.metrics import Metrics
from vlmtune.serving.rows import Asking
from vlmtune.serving.served import Served, ServedModel
from vlmtune.serving.settings import EngineConfig, Settings
from vlmtune.serving.waiting import too_slow

logger = logging.getLogger(__name__)

TURN = 8  # steps before another adapter's batch has its turn: changing adapters costs about a step
STALLED = 300.0  # seconds of one forward after which the engine counts as stuck
LEAST_CACHE = 2048  # tokens to which a device that runs out of memory may bring ``cache_tokens``
ROOMY = 0.75  # of ``cache_tokens``; below that, answers that had to wait go on
PROBE = Conversation("probe", (Message("user", (Text("?"),)),))


class Engine(Front):
    """Answers questions with a served model, in this process.

    Args:
        served: The model, and the names it answers under.
        config: How many at once.
        metrics: Where figures go.
    """

    def __init__(
        self, served: Served, config: EngineConfig | None = None, metrics: Metrics | None = None
    ) -> None:
        super().__init__(served, config, served.context, metrics)
        self._served = served
        self._batches: list[Batch] = []
        self._alone: Asking | None = None
        self._cache_tokens = self.config.cache_tokens
        self._stopping = self._fatal = False
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="vlmtune engine", daemon=True)

    # For every thread

    def start(self) -> None:
        """Make sure that the model answers, and begin.

        Raises:
            ModelError: If it does not.
        """
        if not self._sound():
            raise ModelError("the model fails on the plainest question; the log says why")
        self._thread.start()

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more questions, finish those that are there as far as time allows, and end."""
        until = time.monotonic() + drain_seconds
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            while self._busy and time.monotonic() < until and self._thread.is_alive():
                self._changed.wait(0.05)
        self._give_up(OverloadedError(CLOSING))
        if self._thread.ident is not None:
            self._thread.join(STALLED)
        self._waiting.close()

    @property
    def served(self) -> Served:
        """The model, and the names it answers under."""
        return self._served

    @property
    def running(self) -> int:
        """Answers that are being spoken."""
        return sum(len(batch.rows) for batch in list(self._batches)) + (self._alone is not None)

    @property
    def fault(self) -> str | None:
        """Why it does not answer; None while it does."""
        if self._fatal:
            return FATAL
        if self._stopping:
            return CLOSING
        if not self._thread.is_alive():
            return NOT_RUNNING
        if self._batches and time.monotonic() - self._beat > STALLED:
            return f"the model has been busy with one forward for more than {STALLED:g} s"
        return None

    @property
    def closed(self) -> bool:
        """Whether no question is taken any more."""
        return self._stopping or self._fatal or not self._thread.is_alive()

    # The engine's own thread

    def _run(self) -> None:
        while self._await_work():
            try:
                self._expire()
                self._make_room()
                self._admit()
                self._join()
                self._take_turns()
            except Exception as error:  # noqa: BLE001 - without this thread all would wait for ever
                for batch in self._batches:
                    batch.fail(internal(error))
                self._batches = []
                self._survive(error)

    @property
    def _busy(self) -> bool:
        return bool(len(self._waiting) or self.running)

    def _await_work(self) -> bool:
        """Wait for something to do; False when there will be nothing more."""
        with self._changed:
            self._waiting.clear_out()
            while not (self._waiting.ready or self._batches):
                if self._fatal or (self._stopping and not self._busy):
                    return False
                self._changed.wait(1.0)
                self._waiting.clear_out()
            self._beat = time.monotonic()
            return not self._fatal

    def _expire(self) -> None:
        """End what took too long, and forget whom nobody listens to."""
        now = time.monotonic()
        for batch in list(self._batches):
            for row in batch.rows:
                if now > row.asking.deadline:
                    row.asking.fail(too_slow())
            batch.leave()
            if not batch.rows:
                self._batches.remove(batch)

    def _make_room(self) -> None:
        """Let younger answers wait while the caches are full, and go on when they are not."""
        running = [batch for batch in self._batches if not batch.parked]
        held = sum(batch.tokens for batch in self._batches)
        if held > self._cache_tokens and sum(len(batch.rows) for batch in running) > 1:
            largest = max(running, key=lambda batch: batch.tokens)
            if len(largest.rows) > 1:
                self._batches.append(largest.park())
            else:
                largest.parked = True
        parked = [batch for batch in self._batches if batch.parked]
        if parked and (len(parked) == len(self._batches) or held < ROOMY * self._cache_tokens):
            oldest = min(parked, key=lambda batch: min(row.asking.asked for row in batch.rows))
            oldest.parked = False

    def _admit(self) -> None:
        """Read the next questions."""
        group = self._next_group()
        if not group:
            return
        for asking in group:
            self.metrics.observe("queue_seconds", time.monotonic() - asking.asked)
        if side_by_side(group[0].served):
            self._read_together(group)
        else:
            self._answer_alone(group[0])
        for asking in group:
            self.metrics.observe("first_token_seconds", time.monotonic() - asking.asked)
            self.metrics.add("prompt_tokens", asking.prompt_tokens)

    def _next_group(self) -> list[Asking]:
        """Questions to one model that fit beside what is running, in order of arrival."""
        group: list[Asking] = []
        rows = longest = answer = 0
        with self._changed:
            room = self.config.batch_rows - self.running
            free = self._cache_tokens - sum(batch.soon for batch in self._batches)
            if any(batch.parked for batch in self._batches):
                return []
            for asking in list(self._waiting.ready):
                if group and asking.served is not group[0].served:
                    continue
                rows += asking.settings.n
                longest = max(longest, asking.prompt_tokens)
                answer = max(answer, min(asking.max_tokens, AHEAD))
                first = not group and not self.running  # alone, it fits whatever its size
                fits = rows <= room and rows * (longest + answer) <= free
                if not first and not fits:
                    break
                if group and (len(group) + 1) * longest > self.config.prefill_tokens:
                    break
                group.append(asking)
                self._waiting.ready.remove(asking)
                if not side_by_side(asking.served):
                    break
            self._waiting.encode_ahead()
        return group

    def _read_together(self, group: list[Asking]) -> None:
        try:
            self.served.use(group[0].served)
            self._batches.append(Batch(self.served.model, group[0].served, group))
        except Exception as error:  # noqa: BLE001 - one of them may be to blame: each by itself
            self._survive(error)
            if len(group) == 1:
                group[0].fail(internal(error))
                return
            for asking in group:
                self._read_together([asking])

    def _answer_alone(self, asking: Asking) -> None:
        self._alone = asking
        try:
            self.served.use(asking.served)
            answer_alone(self.served.model, asking)
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            asking.fail(internal(error))
            self._survive(error)
        finally:
            self._alone = None

    def _join(self) -> None:
        """Make one batch of two where that takes no more than the cache allows."""
        for one, other in combinations(list(self._batches), 2):
            if one not in self._batches or other not in self._batches:
                continue
            soon = one.joined(other)
            others = sum(each.soon for each in self._batches if each not in (one, other))
            if soon is not None and soon + others <= self._cache_tokens:
                self._batches.remove(other)
                one.join(other)

    def _take_turns(self) -> None:
        running = [batch for batch in self._batches if not batch.parked]
        adapters = {batch.served.adapter for batch in running}
        for batch in running:
            self.served.use(batch.served)
            for _ in range(TURN if len(adapters) > 1 else 1):
                self._step(batch)

    def _step(self, batch: Batch) -> None:
        self._beat = time.monotonic()
        try:
            batch.leave()
            if batch.rows:
                self.metrics.observe("batch_rows", len(batch.rows))
                batch.step()
        except Exception as error:  # noqa: BLE001 - the other batches, and the next, go on
            batch.fail(internal(error))
            self._survive(error)
        if not batch.rows and batch in self._batches:
            self._batches.remove(batch)

    # When something fails

    def _survive(self, error: Exception) -> None:
        """Go on after a forward that failed, unless the model itself is broken."""
        if isinstance(error, torch.OutOfMemoryError):
            self._cache_tokens = max(self._cache_tokens // 2, LEAST_CACHE)
            logger.warning("out of memory: the caches may hold %d tokens now", self._cache_tokens)
            torch.cuda.empty_cache()
        if not self._sound():
            logger.critical(FATAL, exc_info=error)
            self._fatal = True
            self._give_up(OverloadedError(FATAL))

    def _sound(self) -> bool:
        """Whether the model still answers the plainest question."""
        served = self.served.first
        events: list[Event] = []
        asking = Asking(PROBE, Settings(max_tokens=1), served, events.append, STALLED)
        asking.max_tokens = 1
        try:
            asking.encoded = served.encoder.encode(PROBE, ask=True)
            self.served.use(served)
            if side_by_side(served):
                Batch(self.served.model, served, [asking]).step()
            else:
                answer_alone(self.served.model, asking)
        except Exception as error:
            logger.error("the model fails on the plainest question", exc_info=error)
        return bool(events) and isinstance(events[-1], Ended)

    def _give_up(self, error: VlmtuneError) -> None:
        with self._changed:
            self._waiting.give_up(error)
            for batch in list(self._batches):
                batch.fail(error)
            if self._alone is not None:
                self._alone.fail(error)
            if self._fatal:
                self._batches = []
            self._changed.notify_all()


def side_by_side(served: ServedModel) -> bool:
    """Whether questions to a model can be answered together, token by token."""
    facts = served.encoder.family.facts
    return facts.decodes and facts.batches
