"""Batched greedy generation, equal text for text to asking one question at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
) -> list[Generation]:
    """Answer each conversation's last question.

    Questions of similar length share a batch, so that little is padded; the answers come back in
    the order of the questions.

    Args:
        model: The model, adapter included.
        encoder: Its encoder.
        questions: Rows; a last assistant turn is left out.
        max_new_tokens: Longest answer in tokens.
        batch_rows: Most questions answered at once.
        progress: Called with the number of questions answered so far.
    """
    lengths = [len(tokens_of(encoder, question, ask=True)) for question in questions]
    order = sorted(range(len(questions)), key=lambda index: lengths[index])
    answers: dict[int, Generation] = {}
    with _greedy(model, encoder):
        for start in range(0, len(order), batch_rows):
            chosen = order[start : start + batch_rows]
            encoded = [encoder.encode(questions[index], ask=True) for index in chosen]
            batch = generate_batch(model, encoder, encoded, max_new_tokens)
            answers.update(zip(chosen, batch, strict=True))
            if progress is not None:
                progress(len(answers))
    return [answers[index] for index in range(len(questions))]


def generate_batch(
    model: PreTrainedModel, encoder: Encoder, rows: Sequence[Encoded], max_new_tokens: int
) -> list[Generation]:
    """Answer encoded questions in one batch, left-padded; an answered row leaves the batch."""
    if not encoder.family.facts.decodes:
        return _stock(model, encoder, rows, max_new_tokens)
    said: list[list[int]] = [[] for _ in rows]
    running = list(range(len(rows)))
    decoding = Decoding(model, encoder, rows)
    while running:
        tokens = decoding.logits.argmax(dim=-1)
        for row, token in zip(running, tokens.tolist(), strict=True):
            said[row].append(token)
        going = [
            place
            for place, row in enumerate(running)
            if said[row][-1] not in encoder.end_ids and len(said[row]) < max_new_tokens
        ]
        if len(going) < len(running):
            decoding.keep(going)
            running = [running[place] for place in going]
            tokens = tokens[going]
        if running:
            decoding.step(tokens)
    return [answer_of(encoder, row, ids) for row, ids in zip(rows, said, strict=True)]


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
