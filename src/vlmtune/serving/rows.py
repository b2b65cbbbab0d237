"""A question on its way through the engine, and its answers while they are spoken."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

from vlmtune.data.conversation import Conversation
from vlmtune.errors import VlmtuneError
from vlmtune.models.encode import Encoded, Encoder
from vlmtune.models.family import Tokens
from vlmtune.serving.errors import ServingError
from vlmtune.serving.events import Began, Delta, Ended, Event, Failed, TokenLogprob
from vlmtune.serving.sampling import Pick, Wish, generator
from vlmtune.serving.served import ServedModel
from vlmtune.serving.settings import Settings
from vlmtune.serving.speech import Speech

logger = logging.getLogger(__name__)

Sink = Callable[[Event], None]


class Asking:
    """A question, from asking to the end of its last answer. Only ``cancel`` is for other threads.

    Args:
        question: What is asked, images included.
        settings: How.
        served: The model that is asked.
        sink: Is told every event, from the engine's threads; it must not block.
        seconds: Longest time that all of it may take.

    Attributes:
        encoded: The question as the model reads it, until it was read.
        max_tokens: Longest answer; known when the question is encoded.
        over: Whether nothing more is to be said: answered, failed or cancelled.
    """

    def __init__(
        self,
        question: Conversation,
        settings: Settings,
        served: ServedModel,
        sink: Sink,
        seconds: float,
    ) -> None:
        self.question: Conversation | None = question
        self.settings = settings
        self.served = served
        self.encoded: Encoded | None = None
        self.max_tokens = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.asked = time.monotonic()
        self.deadline = self.asked + seconds
        self.over = False
        self._sink = sink
        self._lock = threading.Lock()
        self._left = settings.n

    def cancel(self) -> bool:
        """Say that nobody listens any more; False if it was over already."""
        with self._lock:
            first, self.over = not self.over, True
        return first

    def fail(self, error: VlmtuneError) -> bool:
        """Tell that there is no answer; False if it was over already."""
        first = self.cancel()
        if first:
            self._tell(Failed(error))
        return first

    def begin(self) -> list[Row]:
        """The rows of its answers, now that the question was read."""
        assert self.encoded is not None
        seed = self.settings.seed
        seed = secrets.randbits(63) if seed is None else seed
        rows = [Row(self, self.encoded.tokens, choice, seed) for choice in range(self.settings.n)]
        # Pixels and file are not needed any more; in a long answer they would stay for minutes.
        self.encoded = self.question = None
        self.tell(Began(self.prompt_tokens))
        return rows

    def tell(self, event: Event) -> None:
        """Tell an event, unless nobody listens."""
        if not self.over:
            self._tell(event)

    def ended(self, event: Ended) -> bool:
        """Tell that an answer is whole; True if it was the last."""
        self.completion_tokens += event.completion_tokens
        self.tell(event)
        self._left -= 1
        return not self._left and self.cancel()

    def _tell(self, event: Event) -> None:
        try:
            self._sink(event)
        except Exception:
            logger.debug("a listener failed", exc_info=True)
            self.over = True


class Answer:
    """The events of one question as they come; leaving off early cancels it."""

    def __init__(self, asking: Asking, events: SimpleQueue[Event]) -> None:
        self._asking, self._events = asking, events

    def __iter__(self) -> Iterator[Event]:
        """Every event but ``Failed``, whose error is raised."""
        left = self._asking.settings.n
        try:
            while left:
                event = self._events.get()
                if isinstance(event, Failed):
                    raise event.error
                left -= isinstance(event, Ended)
                yield event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Say that nobody listens any more; the answer ends within a step."""
        self._asking.cancel()

    def result(self) -> list[Ended]:
        """Wait for all answers, in the order of ``choice``."""
        ended = [event for event in self if isinstance(event, Ended)]
        return sorted(ended, key=lambda event: event.choice)


class Row:
    """One answer while it is spoken.

    Attributes:
        wish: How its next token is chosen.
        over: Whether it was told whole.
    """

    def __init__(self, asking: Asking, tokens: Tokens, choice: int, seed: int) -> None:
        settings, encoder = asking.settings, asking.served.encoder
        self.asking = asking
        self.wish = Wish(
            temperature=settings.temperature,
            top_p=settings.top_p,
            generator=generator(seed, choice),
            top_logprobs=settings.top_logprobs if settings.logprobs else None,
        )
        self.over = False
        self._choice = choice
        self._encoder = encoder
        self._question = tokens
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._logprobs_told = 0
        self._speech: Speech | None = None
        if settings.stream or settings.stop:
            tokenizer = encoder.family.parts.tokenizer
            self._speech = Speech(tokenizer, encoder.lead, settings.stop)

    @property
    def left(self) -> int:
        """Most tokens still to be said."""
        return self.asking.max_tokens - len(self._ids)

    def hear(self, pick: Pick | None) -> bool:
        """Take the next token; True if the answer goes on."""
        if pick is None:
            self.asking.fail(ServingError("the model's logits are no numbers; the model is broken"))
            return False
        if pick.token in self._encoder.end_ids:
            self._end("stop", said=len(self._ids) + 1)
            return False
        self._ids.append(pick.token)
        if self.wish.top_logprobs is not None:
            self._logprobs.append(self._told(pick))
        if self._speech is not None:
            self._say(self._speech.hear(pick.token), self._speech)
            if self._speech.stopped:
                self._end("stop", said=len(self._ids))
                return False
        if not self.left:
            self._end("length", said=len(self._ids))
            return False
        return True

    def _say(self, text: str, speech: Speech) -> None:
        if self.asking.settings.stream and text:
            # Tokens whose text is held back come with the text.
            kept = self._kept(speech) if speech.stopped else len(self._logprobs)
            logprobs = () if speech.silent and not speech.stopped else self._untold(kept)
            self.asking.tell(Delta(self._choice, text, logprobs))

    def _end(self, reason: str, *, said: int) -> None:
        """Tell the answer whole."""
        self.over = True
        kept = len(self._ids)
        text = None
        if self._speech is not None:
            rest = "" if self._speech.stopped else self._speech.finish()
            if self._speech.stopped:  # a stop text may only show when the last character is whole
                reason, kept = "stop", self._kept(self._speech)
            text = self._speech.told
            logprobs = self._untold(kept)
            if self.asking.settings.stream and (rest or logprobs):
                self.asking.tell(Delta(self._choice, rest, logprobs))
        family, ids = self._encoder.family, self._ids[:kept]
        raw = str(family.parts.tokenizer.decode(ids, skip_special_tokens=False))
        policy = self._encoder.contract.image
        ended = Ended(
            choice=self._choice,
            text=plain_text(self._encoder, ids) if text is None else text,
            boxes=tuple(family.parse_boxes(raw, self._question.image_sizes, policy)),
            finish_reason=reason,
            completion_tokens=said,
            logprobs=tuple(self._logprobs[:kept]),
        )
        self.asking.ended(ended)

    def _untold(self, kept: int) -> tuple[TokenLogprob, ...]:
        told = tuple(self._logprobs[self._logprobs_told : kept])
        self._logprobs_told = max(kept, self._logprobs_told)
        return told

    def _kept(self, speech: Speech) -> int:
        """Tokens that the told text needs; the others spell the text that stopped it."""
        kept = len(self._ids)
        while kept and len(plain_text(self._encoder, self._ids[:kept])) > len(speech.told):
            kept -= 1
        return kept

    def _told(self, pick: Pick) -> TokenLogprob:
        top = tuple(TokenLogprob(id, self._spelled(id), logprob) for id, logprob in pick.top)
        return TokenLogprob(pick.token, self._spelled(pick.token), pick.logprob, top)

    def _spelled(self, token: int) -> str:
        tokenizer = self._encoder.family.parts.tokenizer
        return str(tokenizer.decode([token], skip_special_tokens=False))


def plain_text(encoder: Encoder, ids: Sequence[int]) -> str:
    """The text of an answer, as ``predict`` gives it."""
    text = encoder.family.parts.tokenizer.decode(list(ids), skip_special_tokens=True)
    return str(text).removeprefix(encoder.lead)
