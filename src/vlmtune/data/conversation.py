"""The one form every row takes between its source and a model: a conversation with images.

Parts of a message are ``Text``, ``Image`` (an index into the conversation's images) and ``Box``
(always in pixels of the upright original image; each family renders its own syntax).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlmtune.errors import RowError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text. Control tokens inside it are text, never commands."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """The place of ``conversation.images[index]`` in a message."""

    index: int


@dataclass(frozen=True, slots=True)
class Box:
    """A labelled box ``(x1, y1, x2, y2)`` in float pixels of the upright original image."""

    image: int
    label: str
    xyxy: tuple[float, float, float, float]


Part = Text | Image | Box


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The turn's texts joined, without images and boxes."""
        return "".join(part.text for part in self.content if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as it came: its file's bytes (PNG, JPEG, …) and its path, if it had one."""

    data: bytes = field(repr=False)
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row.

    Attributes:
        id: Unique in its data set.
        messages: The turns, a system turn first if there is one.
        images: Encoded images, in the order of ``Image.index``.
        references: Every acceptable last answer. The assistant turn holds the one trained on.
        meta: Anything else about the row; JSON-serialisable.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[EncodedImage, ...] = ()
    references: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def parts(self) -> Iterator[Part]:
        """All parts of all turns, in reading order."""
        for message in self.messages:
            yield from message.content

    @property
    def answer(self) -> str:
        """Text of the last assistant turn, or an empty string."""
        for message in reversed(self.messages):
            if message.role == "assistant":
                return message.text
        return ""

    @property
    def question(self) -> str:
        """Text of the last user turn, or an empty string."""
        for message in reversed(self.messages):
            if message.role == "user":
                return message.text
        return ""

    def prompt(self) -> Conversation:
        """The same row without its last assistant turn: what a model is asked."""
        messages = self.messages
        if messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        return Conversation(self.id, messages, self.images, self.references, self.meta)


def validate(conversation: Conversation) -> None:
    """Check the form of a training row.

    Raises:
        RowError: With code ``empty_conversation``, ``role_order``, ``empty_answer``, ``no_answer``
            or ``image_mismatch``.
    """
    messages = conversation.messages
    if not messages:
        raise RowError(
            "empty_conversation",
            "the row has no messages; expected at least a user and an assistant turn",
        )
    body = messages[1:] if messages[0].role == "system" else messages
    for position, message in enumerate(body):
        expected = ("user", "assistant")[position % 2]
        if message.role != expected:
            raise RowError(
                "role_order",
                f"turn {position + 1} is {message.role!r}, expected {expected!r}: after an "
                "optional system turn, user and assistant take turns",
            )
        if message.role == "assistant" and not any(
            isinstance(part, Box) or (isinstance(part, Text) and part.text.strip())
            for part in message.content
        ):
            raise RowError(
                "empty_answer",
                f"the answer in turn {position + 1} is empty; nothing could be trained on it",
            )
    if not body or body[-1].role != "assistant":
        raise RowError(
            "no_answer",
            "the row does not end with an assistant turn; nothing could be trained on it",
        )
    used = [part.index for part in conversation.parts() if isinstance(part, Image)]
    if used != list(range(len(conversation.images))):
        raise RowError(
            "image_mismatch",
            f"the messages place images {used}, the row has {len(conversation.images)}; expected "
            "each image once, in order",
        )
