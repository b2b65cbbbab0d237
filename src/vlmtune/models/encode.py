"""The one encoder: a conversation and a contract become token ids, labels, positions and pixels.

Training, evaluation, prediction, API and UI all encode here. Labels stand on the answers' tokens
and the end token that closes each of them, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from vlmtune.data.conversation import Box, Conversation, Image, Message, Text
from vlmtune.data.media import Size, open_image, read_header
from vlmtune.errors import RowError
from vlmtune.models.assemble import IGNORED as IGNORED
from vlmtune.models.assemble import Builder, KindBuilder, Rules
from vlmtune.models.assemble import TokenKind as TokenKind
from vlmtune.models.contract import Contract
from vlmtune.models.family import Family, Tokens
from vlmtune.models.plain_text import Place, Stripping, TextTokenizer, control_tokens
from vlmtune.models.skeleton import Template

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


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
        facts = family.facts
        image = facts.image_place or facts.image_token
        self._template = Template(parts.tokenizer, parts.template, image)
        self._text = TextTokenizer(parts.tokenizer.backend_tokenizer)
        self._controls = control_tokens(parts.tokenizer.backend_tokenizer)
        lead, closing = self._template.exchange()
        end = facts.end_of_turn or parts.tokenizer.eos_token
        if facts.end_of_turn is None and closing is not None:
            end = parts.tokenizer.convert_ids_to_tokens(closing)
        self._rules = Rules(
            family=family,
            policy=contract.image,
            text=self._text,
            controls=self._controls,
            stripping=Stripping.of(parts.tokenizer),
            end=family.token_id(str(end)),
            # A template that knows no end would never teach the model to stop: it is added.
            adds_end=facts.end_of_turn is None and closing is None,
        )
        self._lead = lead

    def complete(self, conversation: Conversation) -> Conversation:
        """The conversation with the contract's system turn, prompt and instruction put in."""
        messages = tuple(
            self._with_instruction(self._with_prompt(message)) for message in conversation.messages
        )
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
        builder = Builder(self._rules, completed.messages, tuple(sizes))
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

    def encode_together(
        self, conversations: Sequence[Conversation], *, ask: bool = False
    ) -> list[Encoded]:
        """``encode`` of rows that go through the model in one forward."""
        return [self.encode(each, ask=ask) for each in conversations]

    def kinds(self, conversation: Conversation) -> list[TokenKind]:
        """What each token of ``tokens`` is, for people to look at; slower than ``tokens``."""
        completed = self.complete(conversation)
        sizes = tuple(
            read_header(image.data, self.contract.image).size for image in completed.images
        )
        builder = KindBuilder(self._rules, completed.messages, sizes)
        for item in self._template.skeleton(completed.messages, ask=False):
            builder.add(item)
        builder.finish()
        return builder.kinds

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text within a row; control tokens inside it are encoded as text."""
        return self._text.ids(text, Place.WITHIN)

    def control_tokens_in(self, text: str) -> list[str]:
        """Control tokens of the vocabulary that stand in a text, where they are only text."""
        return [token for token in self._controls if token in text]

    def control_id(self, token: str) -> int:
        """Id of a control token that a family writes itself."""
        return self._rules.control_id(token)

    @property
    def end_id(self) -> int:
        """Id of the token that ends an answer."""
        return self._rules.end

    @property
    def pad_id(self) -> int:
        """Id that fills what is empty; no model sees it."""
        identifier = self.family.parts.tokenizer.pad_token_id
        return int(identifier) if isinstance(identifier, int) else self.end_id

    @property
    def end_ids(self) -> frozenset[int]:
        """The end of a turn, and the tokenizer's end and padding, which base models stop with.

        And what the family besides knows as an end.
        """
        eos = self.family.parts.tokenizer.eos_token_id
        ends = {self.end_id, self.pad_id, *map(self.control_id, self.family.facts.further_ends)}
        return frozenset(ends | ({eos} if isinstance(eos, int) else set()))

    @property
    def adds_end(self) -> bool:
        """Whether the end of an answer is ours, because the template writes none."""
        return self._rules.adds_end

    @property
    def lead(self) -> str:
        """What the model writes before an answer, e.g. the space after ``Assistant:``."""
        return self._lead

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

    def _with_instruction(self, message: Message) -> Message:
        """Words before the images, unless the turn has some there already."""
        instruction = self.contract.instruction
        begins_with = message.content[0] if message.content else None
        if instruction is None or message.role != "user" or not isinstance(begins_with, Image):
            return message
        return replace(message, content=(Text(instruction), *message.content))
