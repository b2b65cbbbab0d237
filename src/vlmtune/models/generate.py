"""Batched greedy generation, equal text for text to asking one question at a time."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vlmtune.data.conversation import Box, Conversation
from vlmtune.errors import DataError
from vlmtune.models.decode import Decoding, pad_left
from vlmtune.models.encode import Encoded, Encoder
from vlmtune.models.family import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)

TOKENS_TOGETHER = 32768  # most tokens, padding included, of questions that are answered at once


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: The answer without control tokens.
        boxes: Boxes in it, in pixels of the upright image.
        prompt_tokens: Tokens of the question, image tokens included.
        completion_tokens: Tokens of the answer, its end token included.
        finished: Whether the model ended the answer itself, within the limit.
    """

    text: str
    boxes: tuple[Box, ...]
    prompt_tokens: int
    completion_tokens: int
    finished: bool


def generate(
    model: PreTrainedModel,
    encoder: Encoder,
    questions: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_rows: int = 32,
    progress: Callable[[int], None] | None = None,
    tries_again: bool = True,
) -> list[Generation]:
    """Answer each conversation's last question.

    Questions of similar length are answered side by side, so that little is padded; where enough of
    them are done, others take their places. The answers come back in the order of the questions.

    Args:
        model: The model, adapter included.
        encoder: Its encoder.
        questions: Rows; a last assistant turn is left out.
        max_new_tokens: Longest answer in tokens.
        batch_rows: Most questions answered at once; fewer where their prompts are long.
        progress: Called with the number of questions answered so far.
        tries_again: Whether to go on with half as many at once where the device's memory is full.
            Not where other processes wait for this one's forwards.
    """
    lengths = [len(tokens_of(encoder, question, ask=True)) for question in questions]
    waiting = deque(sorted(range(len(questions)), key=lambda index: lengths[index]))
    answers: dict[int, Generation] = {}
    together = Answering(model, encoder, max_new_tokens)
    with _greedy(model, encoder):
        while waiting or together.places:
            try:
                room = _room(together, waiting, lengths, batch_rows)
                if room:
                    next_ones = list(islice(waiting, room))
                    rows = [questions[index] for index in next_ones]
                    together.ask(next_ones, encoder.encode_together(rows, ask=True))
                    for _ in next_ones:
                        waiting.popleft()
                done = together.say()
            except torch.OutOfMemoryError:
                if not tries_again or batch_rows == 1:
                    raise
                # Greedy answers begin anew as they began: nothing is lost but time.
                waiting.extendleft(reversed(together.forget()))
                batch_rows = max(1, min(batch_rows, len(waiting)) // 2)
                logger.warning(
                    "the device's memory is full: going on with %d questions at once "
                    "(evaluation.batch_rows)",
                    batch_rows,
                )
                continue
            answers.update(done)
            if done and progress is not None:
                progress(len(answers))
    return [answers[index] for index in range(len(questions))]


def _room(
    together: Answering, waiting: Sequence[int], lengths: Sequence[int], batch_rows: int
) -> int:
    """How many of those who wait are asked now."""
    running = len(together.places)
    if not waiting or (running and (2 * running > batch_rows or not together.joinable)):
        return 0
    room = 0
    for index in islice(waiting, batch_rows - running):
        longest = max(together.length, lengths[index])  # they are sorted: it grows
        if running + room and (running + room + 1) * longest > TOKENS_TOGETHER:
            break
        room += 1
    return room


class Answering:
    """Questions that are answered side by side, each of which leaves when it is answered.

    Args:
        model: The model, in evaluation mode and with greedy settings.
        encoder: Its encoder.
        max_new_tokens: Longest answer in tokens.

    Attributes:
        places: What the questions are called that are being answered.
    """

    def __init__(self, model: PreTrainedModel, encoder: Encoder, max_new_tokens: int) -> None:
        self._model, self._encoder, self._limit = model, encoder, max_new_tokens
        self._decodes = encoder.family.facts.decodes
        self._decoding: Decoding | None = None
        self._asked: list[Encoded] = []
        self._said: list[list[int]] = []
        self.places: list[int] = []

    @property
    def joinable(self) -> bool:
        """Whether others may join those that are being answered."""
        return self._decoding is None or self._decoding.joinable

    @property
    def length(self) -> int:
        """Tokens of each row so far, padding included."""
        return 0 if self._decoding is None else self._decoding.length

    def ask(self, places: Sequence[int], rows: Sequence[Encoded]) -> None:
        """Read further questions, encoded with ``ask=True``."""
        if self._decodes:
            decoding = Decoding(self._model, self._encoder, rows)
            if self._decoding is None:
                self._decoding = decoding
            else:
                self._decoding.join(decoding)
        # What was seen is in the caches now; the pixels of the others are still needed.
        self._asked += [replace(row, vision={}) for row in rows] if self._decodes else rows
        self._said += [[] for _ in rows]
        self.places += places

    def say(self) -> dict[int, Generation]:
        """Say the next token of every answer; returns those that are finished."""
        if self._decoding is None:
            answers = _stock(self._model, self._encoder, self._asked, self._limit)
            return dict(zip(self.forget(), answers, strict=True))
        tokens = self._decoding.logits.argmax(dim=-1)
        for said, token in zip(self._said, tokens.tolist(), strict=True):
            said.append(token)
        ends = self._encoder.end_ids
        going = [
            row
            for row, said in enumerate(self._said)
            if said[-1] not in ends and len(said) < self._limit
        ]
        if len(going) == len(self.places):
            self._decoding.step(tokens)
            return {}
        done = {
            self.places[row]: answer_of(self._encoder, self._asked[row], self._said[row])
            for row in sorted(set(range(len(self.places))) - set(going))
        }
        if going:
            self._decoding.keep(going)
            self._decoding.step(tokens[going])
        else:
            self._decoding = None
        self._asked = [self._asked[row] for row in going]
        self._said = [self._said[row] for row in going]
        self.places = [self.places[row] for row in going]
        return done

    def forget(self) -> list[int]:
        """Leave all unanswered; returns what they were called."""
        places, self.places = self.places, []
        self._asked, self._said, self._decoding = [], [], None
        return places


@torch.no_grad()
def _stock(
    model: PreTrainedModel, encoder: Encoder, rows: Sequence[Encoded], max_new_tokens: int
) -> list[Generation]:
    """The model's own ``generate``, for families whose decoding is not known."""
    if len(rows) > 1 and not encoder.family.facts.batches:
        alone = (_stock(model, encoder, [row], max_new_tokens) for row in rows)
        return [answer for answers in alone for answer in answers]
    batch = pad_left(encoder, rows)
    inputs = encoder.family.generate_inputs(
        {name: tensor.to(model.device) for name, tensor in batch.items()}
    )
    answer: Callable[..., Tensor] = cast(Any, model).generate
    output = answer(**inputs, max_new_tokens=max_new_tokens)
    answers = output[:, batch["input_ids"].shape[1] :].tolist()
    return [answer_of(encoder, row, ids) for row, ids in zip(rows, answers, strict=True)]


def tokens_of(encoder: Encoder, row: Conversation, *, ask: bool) -> Tokens:
    """Tokens of a row that somebody wants answered.

    Raises:
        DataError: Naming the row that the model cannot be asked about.
    """
    try:
        return encoder.tokens(row, ask=ask)
    except DataError as error:
        raise DataError(
            error.code,
            f"row {row.id!r} cannot be put to the model: {error}. `vlmtune check DATASET "
            "--model MODEL` finds all such rows",
        ) from error


def answer_of(encoder: Encoder, row: Encoded, ids: list[int]) -> Generation:
    """An answer from the ids that a model said, up to its end."""
    ends = encoder.end_ids
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    finished = length < len(ids)
    tokenizer = encoder.family.parts.tokenizer
    raw = str(tokenizer.decode(ids[:length], skip_special_tokens=False))
    text = str(tokenizer.decode(ids[:length], skip_special_tokens=True))
    return Generation(
        text=text.removeprefix(encoder.lead),
        boxes=tuple(
            encoder.family.parse_boxes(raw, row.tokens.image_sizes, encoder.contract.image)
        ),
        prompt_tokens=len(row.tokens),
        completion_tokens=length + finished,
        finished=finished,
    )


@contextmanager
def _greedy(model: PreTrainedModel, encoder: Encoder) -> Iterator[None]:
    """Greedy settings and nothing of the model's own.

    ``generate`` fills what a call leaves open from the model's generation config, where hubs put
    sampling and repetition penalties that would leak into an evaluation.
    """
    from transformers import GenerationConfig

    own, training = model.generation_config, model.training
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=sorted(encoder.end_ids),
        pad_token_id=encoder.pad_id,
        use_cache=True,
    )
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)
