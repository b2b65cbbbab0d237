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


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel, encoder: Encoder, rows: Sequence[Encoded], max_new_tokens: int
) -> list[Generation]:
    """Answer encoded questions in one batch, left-padded."""
    batch = pad_left(encoder, rows)
    inputs = encoder.family.generate_inputs(
        {name: tensor.to(model.device) for name, tensor in batch.items()}
    )
    answer: Callable[..., Tensor] = cast(Any, model).generate
    output = answer(**inputs, max_new_tokens=max_new_tokens)
    answers = output[:, batch["input_ids"].shape[1] :].tolist()
    return [_answer(encoder, row, ids) for row, ids in zip(rows, answers, strict=True)]


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


def pad_left(encoder: Encoder, rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """Rows side by side, right-aligned: ``input_ids (rows, longest)`` and what belongs to it."""
    longest = max(len(row.tokens) for row in rows)
    input_ids = torch.full((len(rows), longest), _pad_id(encoder), dtype=torch.long)
    image_mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        start = longest - len(row.tokens)
        input_ids[index, start:] = torch.from_numpy(row.tokens.ids)
        image_mask[index, start:] = torch.from_numpy(row.tokens.image_mask)
        attention_mask[index, start:] = 1
    return {
        "input_ids": input_ids,
        "image_mask": image_mask,
        "attention_mask": attention_mask,
        **encoder.family.join_vision([row.vision for row in rows]),
    }


def _answer(encoder: Encoder, row: Encoded, ids: list[int]) -> Generation:
    ends = _end_ids(encoder)
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
        eos_token_id=sorted(_end_ids(encoder)),
        pad_token_id=_pad_id(encoder),
        use_cache=True,
    )
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _end_ids(encoder: Encoder) -> set[int]:
    """The end of a turn, and the tokenizer's end and padding, which base models stop with."""
    eos = encoder.family.parts.tokenizer.eos_token_id
    return {encoder.end_id, _pad_id(encoder)} | ({eos} if isinstance(eos, int) else set())


def _pad_id(encoder: Encoder) -> int:
    tokenizer = encoder.family.parts.tokenizer
    identifier = tokenizer.pad_token_id
    return int(identifier) if identifier is not None else encoder.end_id
