"""The one encoder: a conversation and a contract become token ids, labels, positions and pixels.

Training, evaluation, prediction, API and UI all encode here. Labels stand on the answers' tokens
and the end token that closes each of them, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from typing import Literal as Literal_

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from vlmtune.data.conversation import Box, Conversation, Image, Message, Text
from vlmtune.data.media import Size, open_image, read_header
from vlmtune.errors import ModelError, RowError
from vlmtune.models.contract import Contract
from vlmtune.models.family import Family, Piece, Tokens
from vlmtune.models.skeleton import Control, ImageSlot, Item, Literal, Slot, Template

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

IGNORED = -100
TokenKind = Literal_["template", "question", "answer", "control", "image"]


@dataclass(frozen=True)
class Encoded:
    """A row ready for the model.

    Attributes:
        id: The row's id.
        tokens: Ids, labels and image places.
        positions: Positions of the row alone, shape ``(rows, tokens)``.
        vision: The vision tensors, as the family's processor makes them.
    """

    id: str
    tokens: Tokens
    positions: Tensor
    vision: Mapping[str, Tensor]


class Encoder:
    """Encodes conversations for one model under one contract. Safe to share between threads.

    Args:
        family: The family bound to the model's parts.
        contract: What must hold in training and in serving alike.
    """

    def __init__(self, family: Family, contract: Contract) -> None:
        self.family = family
        self.contract = contract
        parts = family.parts
        self._template = Template(parts.tokenizer, parts.template, family.facts.image_token)
        self._text = _text_only(parts.tokenizer.backend_tokenizer)
        self._controls = parts.tokenizer.get_added_vocab()
        self._end = family.token_id(family.facts.end_of_turn)

    def complete(self, conversation: Conversation) -> Conversation:
        """The conversation with the contract's system turn and prompt where it has none."""
        messages = tuple(self._with_prompt(message) for message in conversation.messages)
        system = self.contract.system_prompt
        if system is not None and (not messages or messages[0].role != "system"):
            messages = (Message("system", (Text(system),)), *messages)
        return replace(conversation, messages=messages)

    def tokens(
        self, conversation: Conversation, *, ask: bool = False, sizes: Sequence[Size] | None = None
    ) -> Tokens:
        """Token ids and labels from image headers alone; nothing is decoded.

        Args:
            conversation: The row.
            ask: True to encode a question: the last answer is left out and the template's opening
                of an assistant turn is added.
            sizes: Upright sizes of the images, where they are known already.

        Raises:
            RowError: With code ``empty_conversation``, ``no_labels`` if there is nothing to train
                on (unless ``ask``), or ``image_mismatch`` if the turns do not place each image
                once, in order.
        """
        completed = self.complete(conversation.prompt() if ask else conversation)
        if not completed.messages:
            raise RowError("empty_conversation", f"row {conversation.id!r} has no messages")
        if sizes is None:
            sizes = tuple(
                read_header(image.data, self.contract.image).size for image in completed.images
            )
        placed = [part.index for part in completed.parts() if isinstance(part, Image)]
        if placed != list(range(len(sizes))):
            raise RowError(
                "image_mismatch",
                f"row {conversation.id!r} places images {placed} and has {len(sizes)}; expected "
                "each image once, in order",
            )
        builder = _Builder(self, completed.messages, tuple(sizes))
        for item in self._template.skeleton(completed.messages, ask=ask):
            builder.add(item)
        tokens = builder.finish()
        if not ask and not tokens.trained:
            raise RowError("no_labels", f"row {conversation.id!r} has no answer to train on")
        return tokens

    def encode(self, conversation: Conversation, *, ask: bool = False) -> Encoded:
        """Tokens, positions and pixels of a row; see ``tokens`` for the arguments."""
        pictures: list[Picture] = [
            open_image(image.data, self.contract.image) for image in conversation.images
        ]
        sizes = tuple(Size(*picture.size) for picture in pictures)
        tokens = self.tokens(conversation, ask=ask, sizes=sizes)
        return Encoded(
            id=conversation.id,
            tokens=tokens,
            positions=self.family.positions(tokens, self.contract.image),
            vision=self.family.image_inputs(pictures, self.contract.image),
        )

    def kinds(self, conversation: Conversation) -> list[TokenKind]:
        """What each token of ``tokens`` is, for people to look at; slower than ``tokens``."""
        completed = self.complete(conversation)
        sizes = tuple(
            read_header(image.data, self.contract.image).size for image in completed.images
        )
        builder = _KindBuilder(self, completed.messages, sizes)
        for item in self._template.skeleton(completed.messages, ask=False):
            builder.add(item)
        builder.finish()
        return builder.kinds

    def text_offsets(self, text: str) -> list[int]:
        """Where each token of ``text_ids`` begins in the text, in characters."""
        return [start for start, _ in self._text.encode(text, add_special_tokens=False).offsets]

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text; control tokens inside it are encoded as text."""
        return list(self._text.encode(text, add_special_tokens=False).ids)

    def control_tokens_in(self, text: str) -> list[str]:
        """Control tokens of the vocabulary that stand in a text, where they are only text."""
        return [token for token in self._controls if token in text]

    def pieces(self, message: Message, part: int, sizes: Sequence[Size]) -> list[Piece]:
        """A part of a turn as the family writes it."""
        content = message.content[part]
        if isinstance(content, Box):
            return self.family.render_box(content, sizes[content.image])
        assert isinstance(content, Text)
        return [Piece(content.text)]

    def control_id(self, token: str) -> int:
        """Id of a control token that a family writes itself."""
        if token not in self._controls:
            raise ModelError(
                f"the tokenizer lacks the control token {token!r} that its family writes"
            )
        return self._controls[token]

    @property
    def end_id(self) -> int:
        """Id of the token that ends an answer."""
        return self._end

    def _with_prompt(self, message: Message) -> Message:
        prompt = self.contract.prompt
        if prompt is None or message.role != "user":
            return message
        if any(
            isinstance(part, Box) or (isinstance(part, Text) and part.text.strip())
            for part in message.content
        ):
            return message
        if not any(isinstance(part, Image) for part in message.content):
            return message
        images = tuple(part for part in message.content if isinstance(part, Image))
        return replace(message, content=(*images, Text(prompt)))


class _Builder:
    """Collects tokens; a run of plain text is encoded as one, as the tokenizer would see it.

    A run is broken before an answer, even where the tokenizer would merge across: when the model is
    asked, the prompt ends there, and training must show it the same ids.
    """

    def __init__(
        self, encoder: Encoder, messages: Sequence[Message], sizes: tuple[Size, ...]
    ) -> None:
        self._encoder = encoder
        self._messages = messages
        self._sizes = sizes
        self._ids: list[int] = []
        self._trained: list[bool] = []
        self._image: list[bool] = []
        self._run: list[str] = []
        self._run_trained = False
        self._in_answer = False
        self._next_image = 0

    def add(self, item: Item) -> None:
        if isinstance(item, Slot):
            self._slot(item)
        elif isinstance(item, Literal):
            # Inside an answer too: what the template writes is not the answer.
            self._text(item.text, trained=False)
        elif isinstance(item, ImageSlot):
            self._image_tokens()
        elif isinstance(item, Control):
            ends = item.id == self._encoder.end_id
            self._control(item.id, trained=self._in_answer and ends)
            self._in_answer = self._in_answer and not ends

    def finish(self) -> Tokens:
        self._flush()
        if self._in_answer:
            raise ModelError(
                "the chat template does not close an answer with "
                f"{self._encoder.family.facts.end_of_turn!r}; the model would never learn to stop"
            )
        ids = np.array(self._ids, dtype=np.int64)
        return Tokens(
            ids=ids,
            labels=np.where(np.array(self._trained, dtype=bool), ids, IGNORED),
            image_mask=np.array(self._image, dtype=bool),
            image_sizes=self._sizes,
        )

    def _slot(self, slot: Slot) -> None:
        message = self._messages[slot.message]
        self._in_answer = message.role == "assistant"
        for piece in self._encoder.pieces(message, slot.part, self._sizes):
            if piece.control:
                self._control(self._encoder.control_id(piece.text), trained=self._in_answer)
            else:
                self._text(piece.text, trained=self._in_answer)

    def _image_tokens(self) -> None:
        family, policy = self._encoder.family, self._encoder.contract.image
        count = family.visual_tokens(self._sizes[self._next_image], policy)
        self._next_image += 1
        self._flush()
        self._append([family.image_token_id] * count, trained=False, image=True)

    def _control(self, identifier: int, *, trained: bool) -> None:
        self._flush()
        self._append([identifier], trained=trained)

    def _text(self, text: str, *, trained: bool) -> None:
        if trained != self._run_trained:
            self._flush()
        self._run.append(text)
        self._run_trained = trained

    def _flush(self) -> None:
        text, self._run = "".join(self._run), []
        if text:
            self._append(self._encoder.text_ids(text), trained=self._run_trained)

    def _append(self, ids: Sequence[int], *, trained: bool, image: bool = False) -> None:
        self._ids += ids
        self._trained += [trained] * len(ids)
        self._image += [image] * len(ids)


class _KindBuilder(_Builder):
    """Notes beside the tokens what they are."""

    def __init__(
        self, encoder: Encoder, messages: Sequence[Message], sizes: tuple[Size, ...]
    ) -> None:
        super().__init__(encoder, messages, sizes)
        self.kinds: list[TokenKind] = []
        self._writing: TokenKind = "template"
        self._begins: list[tuple[int, TokenKind]] = []  # character in the run, kind from there

    def add(self, item: Item) -> None:
        if isinstance(item, Slot):
            role = self._messages[item.message].role
            self._writing = "answer" if role == "assistant" else "question"
        else:
            self._writing = "template"
        super().add(item)

    def _text(self, text: str, *, trained: bool) -> None:
        if trained != self._run_trained:
            self._flush()
            self._run_trained = trained
        self._begins.append((sum(map(len, self._run)), self._writing))
        super()._text(text, trained=trained)

    def _flush(self) -> None:
        begins, self._begins = self._begins, []
        text = "".join(self._run)
        if text:
            for start in self._encoder.text_offsets(text):
                self.kinds.append([kind for place, kind in begins if place <= start][-1])
        super()._flush()

    def _append(self, ids: Sequence[int], *, trained: bool, image: bool = False) -> None:
        super()._append(ids, trained=trained, image=image)
        if len(self.kinds) < len(self._ids):  # a run's own tokens were noted by ``_flush``
            self.kinds += ["image" if image else "control"] * len(ids)


def _text_only(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that knows no control tokens: everything it reads is text.

    It shares the vocabulary with the one it is made from; a copy of a real one takes seconds.
    """
    text_only = Tokenizer(tokenizer.model)
    text_only.normalizer = tokenizer.normalizer
    text_only.pre_tokenizer = tokenizer.pre_tokenizer
    return text_only
