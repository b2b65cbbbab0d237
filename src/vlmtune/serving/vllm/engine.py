"""The engine that lets vLLM compute. Queue, contract, stops, text, boxes and errors stay ours.

A question is encoded as everywhere and sent as tokens and pictures; vLLM tells how it read them,
and unless that is what the contract says, token for token, there is no answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from vlmtune.data.conversation import Conversation
from vlmtune.errors import ContractMismatchError, ModelError, VlmtuneError
from vlmtune.serving.errors import OverloadedError, ServingError, internal
from vlmtune.serving.events import Ended
from vlmtune.serving.front import CLOSING, FATAL, NOT_RUNNING, Front
from vlmtune.serving.metrics import Metrics
from vlmtune.serving.rows import Asking, Row
from vlmtune.serving.sampling import Pick
from vlmtune.serving.served import Catalogue, ServedModel
from vlmtune.serving.settings import EngineConfig, Settings
from vlmtune.serving.vllm.process import KNOWN, Process
from vlmtune.serving.vllm.proof import SIZES, probe
from vlmtune.serving.vllm.question import question
from vlmtune.serving.vllm.wire import Wire, WireError
from vlmtune.serving.waiting import too_slow

logger = logging.getLogger(__name__)

TICK = 0.1  # seconds until a client that left, or an engine that died, is noticed
ENDING = 10.0  # seconds to end by itself
PROBE_SECONDS = 600.0  # the first questions may have to wait for kernels to be compiled
OTHERWISE = "vLLM read the question otherwise than the model's contract says; nothing was answered"


class VllmEngine(Front):
    """Answers questions with a running vLLM.

    Args:
        served: The model under its one name.
        wire: Where vLLM listens.
        config: How many at once.
        process: The process, which ``stop`` ends; None where it is somebody else's.
        metrics: Where figures go.
    """

    def __init__(
        self,
        served: ServedModel,
        wire: Wire,
        config: EngineConfig | None = None,
        *,
        process: Process | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__(Catalogue({served.name: served}), config, None, metrics)
        self._wire, self._process = wire, process
        self._loop = asyncio.new_event_loop()
        self._talks: dict[Asking, Future[None]] = {}
        self._stopping = self._fatal = False
        self._line = threading.Thread(target=self._loop.run_forever, name="vllm wire", daemon=True)
        self._thread = threading.Thread(target=self._run, name="vllm engine", daemon=True)
        self._line.start()

    def start(self) -> None:
        """Wait until vLLM answers, and make sure that it sees what it is shown.

        Raises:
            ModelError: If it does not answer.
            ContractMismatchError: If it reads a question otherwise than the contract says.
        """
        if self._process is not None:
            self._process.wait(lambda: self._soon(self._wire.get("/health"))[0] == 200)
        self._waiting.context = self._context()
        for asked in (probe(), probe(SIZES[0]), probe(SIZES[1], SIZES[0])):
            self._prove(asked)
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
        with self._changed:
            self._changed.wait_for(lambda: not self._talks, ENDING)
        if self._thread.ident is not None:
            self._thread.join(ENDING)
        self._waiting.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._line.join(ENDING)
        if not self._line.is_alive():
            self._loop.close()
        if self._process is not None:
            self._process.stop()

    @property
    def running(self) -> int:
        """Answers that are being spoken."""
        return sum(asking.settings.n for asking in list(self._talks))

    @property
    def fault(self) -> str | None:
        """Why it does not answer; None while it does."""
        if self._fatal:
            return FATAL
        if self._stopping:
            return CLOSING
        return None if self._thread.is_alive() else NOT_RUNNING

    @property
    def closed(self) -> bool:
        """Whether no question is taken any more."""
        return self._stopping or self._fatal or not self._thread.is_alive()

    @property
    def _busy(self) -> bool:
        return bool(len(self._waiting) or self._talks)

    # Before the first question

    def _context(self) -> int | None:
        """How many tokens vLLM has room for, which may be fewer than the model knows."""
        status, body = self._soon(self._wire.get("/v1/models"))
        if status != 200:
            raise ModelError(f"vLLM answers with status {status} when it is asked for its models")
        length = json.loads(body)["data"][0].get("max_model_len")
        return length if isinstance(length, int) else None

    def _prove(self, asked: Conversation) -> None:
        served = self.served.first
        events: list[Any] = []
        asking = Asking(asked, Settings(max_tokens=1), served, events.append, PROBE_SECONDS)
        asking.max_tokens = 1
        asking.encoded = served.encoder.encode(asked, ask=True)
        try:
            self._soon(asyncio.wait_for(self._talk(asking), PROBE_SECONDS))
        except TimeoutError:
            raise ModelError(
                f"vLLM did not answer a question with {len(asked.images)} pictures within "
                f"{PROBE_SECONDS:g} s"
            ) from None
        except WireError as error:
            raise ModelError(
                f"vLLM does not answer a question with {len(asked.images)} pictures: {error} "
                f"(vlmtune speaks to vLLM {KNOWN}, started with --enable-scale-out)"
            ) from None
        except ServingError:
            raise ContractMismatchError(
                f"--engine vllm: of a question with {len(asked.images)} pictures vLLM makes other "
                f"tokens than this model ({served.encoder.family.facts.name}) was trained on. "
                "Serve it without --engine"
            ) from None
        if not (events and isinstance(events[-1], Ended)):
            raise ModelError(f"vLLM does not answer the plainest question: {events[-1:]}")

    def _soon(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # The engine's own thread

    def _run(self) -> None:
        while not self._fatal and (self._busy or not self._stopping):
            with self._changed:
                if not self._admissible():
                    self._changed.wait(TICK)
                self._waiting.clear_out()
            self._tend()
            self._admit()

    def _admissible(self) -> bool:
        """Whether the next question fits beside what is running; with ``changed`` held."""
        ready = self._waiting.ready
        return bool(ready) and self.running + ready[0].settings.n <= self.config.batch_rows

    def _tend(self) -> None:
        """Forget whom nobody listens to, and what takes too long; notice that vLLM is dead."""
        now = time.monotonic()
        for asking, talk in list(self._talks.items()):
            if now > asking.deadline:
                asking.fail(too_slow())
            if asking.over:
                talk.cancel()
        if self._process is not None and not self._process.alive and not self._fatal:
            logger.critical("vLLM ended; the end of its log:\n%s", self._process.tail)
            self._fatal = True
            self._give_up(OverloadedError(FATAL))

    def _admit(self) -> None:
        with self._changed:
            while self._admissible():
                asking = self._waiting.ready.popleft()
                self.metrics.observe("queue_seconds", time.monotonic() - asking.asked)
                self._talks[asking] = asyncio.run_coroutine_threadsafe(
                    self._answer(asking), self._loop
                )
                self.metrics.observe("batch_rows", self.running)
            self._waiting.encode_ahead()

    def _give_up(self, error: VlmtuneError) -> None:
        with self._changed:
            self._waiting.give_up(error)
            for asking, talk in list(self._talks.items()):
                asking.fail(error)
                talk.cancel()
            self._changed.notify_all()

    # The thread of the wire

    async def _answer(self, asking: Asking) -> None:
        try:
            await self._talk(asking)
        except WireError as error:
            logger.error("vLLM failed on a question: %s", error)
            gone = error.status in (0, 503)
            asking.fail(
                OverloadedError("the model does not answer now; try again later")
                if gone
                else ServingError("the model failed on this request; the server's log says why")
            )
        except VlmtuneError as error:
            asking.fail(error)
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            asking.fail(internal(error))
        finally:
            with self._changed:
                self._talks.pop(asking, None)
                self._changed.notify_all()

    async def _talk(self, asking: Asking) -> None:
        encoded, encoder = asking.encoded, asking.served.encoder
        assert encoded is not None
        asking.prompt_tokens = len(encoded.tokens)
        asked = await self._loop.run_in_executor(
            None, question, encoder, encoded, asking.settings, asking.max_tokens
        )
        heard = Heard(asking, encoded.tokens.ids.tolist())
        del encoded, encoder
        # Closing what we read from closes the connection, and vLLM ends what nobody hears.
        async with aclosing(self._wire.generate(asked)) as events:
            async for event in events:
                if heard.take(event):
                    self.metrics.observe("first_token_seconds", time.monotonic() - asking.asked)
                    self.metrics.add("prompt_tokens", asking.prompt_tokens)
                if asking.over:
                    break
        if not asking.over:
            raise WireError("the stream ended before the answer did")


@dataclass
class Heard:
    """What vLLM says to one question, on its way to whoever asked.

    Attributes:
        asking: The question.
        prompt: The tokens that the contract makes of it.
        rows: Its answers, once vLLM has read the question as it stands.
    """

    asking: Asking
    prompt: list[int]
    rows: list[Row] = field(default_factory=list)

    def take(self, event: dict[str, Any]) -> bool:
        """Take one event; True if it was the first.

        Raises:
            ServingError: If vLLM read other tokens than the contract makes of the question.
        """
        first = not self.rows
        if first:
            self._check(event.get("prompt_token_ids"))
            self.rows = self.asking.begin()
        for choice in event["choices"]:
            self._hear(self.rows[choice["index"]], choice)
        return first

    def _check(self, read: list[int] | None) -> None:
        if read != self.prompt:
            logger.error(
                "%s: %s tokens where the contract has %d",
                OTHERWISE,
                "unknown" if read is None else len(read),
                len(self.prompt),
            )
            raise ServingError(OTHERWISE, code="contract_mismatch")

    def _hear(self, row: Row, choice: dict[str, Any]) -> None:
        picks = _picks(choice, self.asking.settings.top_logprobs)
        reason = choice.get("finish_reason")
        if reason == "stop":  # whether or not the end token is told, it was said
            picks.append(Pick(self.asking.served.encoder.end_id))
        for pick in picks:
            if row.over:
                return
            row.hear(pick)
        if reason is not None and not row.over:
            raise WireError(f"vLLM ended an answer before its end: {reason}")


def _picks(choice: dict[str, Any], top: int) -> list[Pick]:
    ids = choice.get("token_ids") or []
    told = (choice.get("logprobs") or {}).get("content") or [None] * len(ids)
    return [_pick(token, logprobs, top) for token, logprobs in zip(ids, told, strict=True)]


def _pick(token: int, told: dict[str, Any] | None, top: int) -> Pick:
    if told is None:
        return Pick(token)
    # The one that was said comes first, be it likely or not; then the likeliest.
    others = {each["token_id"]: each["logprob"] for each in told.get("top_logprobs") or []}
    best = sorted(others.items(), key=lambda pair: -pair[1])[:top]
    return Pick(token, told["logprob"], tuple(best))
