"""Chatting with Qwen-VL-Chat: the history window, where an answer ends, what of it is said so far.

A chat is a ``Conversation`` that grows: ``context`` makes the model's inputs of it, ``reply`` adds
what the model wrote. Images are the conversation's; no text names a file.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlmtune.data.conversation import Conversation, Message
from vlmtune.data.media import Size, open_image, read_header
from vlmtune.errors import ModelError
from vlmtune.models.encode import Encoded, Encoder
from vlmtune.models.family import Tokens
from vlmtune.models.qwen_vl.boxes import answer_parts
from vlmtune.models.qwen_vl.controls import END_OF_TEXT, TURN_END, TURN_START
from vlmtune.models.qwen_vl.tokenization import QWenTokenizer, token_bytes

WINDOW = 6144  # ``max_window_size`` of the model's generation_config.json


def turns_that_fit(lengths: Sequence[int], *, system: int, window: int) -> int:
    """How many of the latest turns of a history are kept.

    The question that is asked is not counted, as in the original.

    Args:
        lengths: Tokens of each turn, a question and its answer, the oldest first.
        system: Tokens of the system turn.
        window: System turn and history stay below so many tokens.
    """
    kept, total = 0, system
    for length in reversed(lengths):
        total += length
        if total >= window:
            break
        kept += 1
    return kept


class Chat:
    """The rules of a chat with one model.

    Args:
        encoder: The model's encoder.
        window: Tokens of history; see ``turns_that_fit``.

    Raises:
        ModelError: If the encoder's tokenizer is of another family.
    """

    def __init__(self, encoder: Encoder, *, window: int = WINDOW) -> None:
        tokenizer = encoder.family.parts.tokenizer
        if not isinstance(tokenizer, QWenTokenizer):
            raise ModelError(
                f"a Qwen-VL chat needs Qwen-VL's tokenizer, found {type(tokenizer).__name__}"
            )
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._window = window
        self._start = encoder.control_id(TURN_START)
        self.stop_ids = tuple(map(encoder.control_id, (TURN_END, TURN_START, END_OF_TEXT)))

    def context(self, conversation: Conversation) -> Encoded:
        """The model's inputs to answer a conversation's last question within the window.

        Pictures keep the numbers that they have in the whole conversation, as do the mentions of
        them in what people write.
        """
        tokens = self._encoder.tokens(conversation, ask=True)
        kept, images = within_window(tokens, self._turns(conversation, tokens), self._window)
        policy, family = self._encoder.contract.image, self._encoder.family
        pictures = [open_image(conversation.images[index].data, policy) for index in images]
        return Encoded(
            id=conversation.id,
            tokens=kept,
            positions=family.positions(kept, policy),
            vision=family.image_inputs(pictures, policy),
        )

    def answer(self, ids: Sequence[int]) -> str:
        """The text of generated ids up to the first stop id, tags of boxes kept."""
        return self._until_stop(ids).decode("utf-8", "replace").strip()

    def so_far(self, ids: Sequence[int]) -> str:
        """The text of an answer that is still being written: always a beginning of ``answer``.

        A character whose last bytes are yet to come is held back.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return decoder.decode(self._until_stop(ids)).strip()

    def reply(self, conversation: Conversation, ids: Sequence[int]) -> Conversation:
        """The conversation with the answer; its boxes are boxes, on the latest picture."""
        policy = self._encoder.contract.image
        sizes: list[Size] = [read_header(image.data, policy).size for image in conversation.images]
        message = Message("assistant", answer_parts(self.answer(ids), sizes))
        return replace(conversation, messages=(*conversation.messages, message))

    def _until_stop(self, ids: Sequence[int]) -> bytes:
        end = next((place for place, each in enumerate(ids) if each in self.stop_ids), len(ids))
        return token_bytes(self._tokenizer, ids[:end])

    def _turns(self, conversation: Conversation, tokens: Tokens) -> Turns:
        messages = self._encoder.complete(conversation.prompt()).messages
        # Only the template writes this token. It opens the answer too, and may add a system turn.
        starts = np.flatnonzero(tokens.ids == self._start).tolist()
        added = len(starts) - 1 - len(messages)
        asked = [
            starts[place + added]
            for place, message in enumerate(messages)
            if message.role == "user"
        ]
        first = added + (messages[0].role == "system")
        return Turns(system=starts[first], questions=(starts[first], *asked[1:]))


@dataclass(frozen=True, slots=True)
class Turns:
    """Where the parts of a context begin, in tokens.

    Attributes:
        system: Tokens of the system turn and the line break behind it.
        questions: Where each question begins; the last one is asked now.
    """

    system: int
    questions: tuple[int, ...]


def within_window(tokens: Tokens, turns: Turns, window: int) -> tuple[Tokens, list[int]]:
    """The tokens without the oldest turns, as many as have no room, and the images that are left.

    Args:
        tokens: A whole conversation that ends with a question.
        turns: Where its parts begin.
        window: See ``turns_that_fit``.
    """
    lengths = np.diff(turns.questions).tolist()
    # The line break behind the system turn counts with the turn that follows it.
    fitting = turns_that_fit(lengths, system=turns.system - 1, window=window)
    start = turns.questions[len(lengths) - fitting]
    keep = np.ones(len(tokens), dtype=bool)
    keep[turns.system : start] = False
    # An image is a run of placeholders; it is kept with its turn.
    begins = tokens.image_mask & ~np.concatenate(([False], tokens.image_mask[:-1]))
    images = np.flatnonzero(keep[begins]).tolist()
    kept = Tokens(
        ids=tokens.ids[keep],
        labels=tokens.labels[keep],
        image_mask=tokens.image_mask[keep],
        image_sizes=tuple(tokens.image_sizes[index] for index in images),
    )
    return kept, images
