"""A chat template rendered once for a shape of conversation, with slots where the texts go.

The template is rendered with a marker in the place of every text. What it writes around the
markers is the template's own; what goes into a slot is a user's. Only the template's own text may
become control tokens: a user's ``<|im_end|>`` stays seven characters of text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmtune.data.conversation import Image, Message
from vlmtune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "\ue000{message}\ue001{part}\ue002"
MARKERS = re.compile("\ue000(\\d+)\ue001(\\d+)\ue002")


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that the template writes."""

    text: str


@dataclass(frozen=True, slots=True)
class Control:
    """A control token that the template writes."""

    id: int


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place of the next image."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a part that is not an image: ``messages[message].content[part]``."""

    message: int
    part: int


Item = Literal | Control | ImageSlot | Slot
Shape = tuple[tuple[str, tuple[bool, ...]], ...]


def shape_of(messages: Sequence[Message]) -> Shape:
    """What a skeleton depends on: the roles, and which parts are images."""
    return tuple(
        (message.role, tuple(isinstance(part, Image) for part in message.content))
        for message in messages
    )


class Template:
    """A chat template and the control tokens that it may write."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, image_token: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._image_token = image_token
        added = {
            str(token): identifier for token, identifier in tokenizer.get_added_vocab().items()
        }
        self._controls = added
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._cache: dict[tuple[Shape, bool], tuple[Item, ...]] = {}

    def skeleton(self, messages: Sequence[Message], *, ask: bool) -> tuple[Item, ...]:
        """The items of a conversation of this shape.

        Args:
            messages: The turns; only their roles and the kinds of their parts matter.
            ask: Whether to end with the opening of an assistant turn (the generation prompt).

        Raises:
            ModelError: If the template drops, repeats or reorders a part.
        """
        key = (shape_of(messages), ask)
        if key not in self._cache:
            self._cache[key] = self._build(messages, ask)
        return self._cache[key]

    def _build(self, messages: Sequence[Message], ask: bool) -> tuple[Item, ...]:
        rendered = self._render(messages, ask)
        items: list[Item] = []
        position = 0
        for match in MARKERS.finditer(rendered):
            items += self._literals(rendered[position : match.start()])
            items.append(Slot(int(match[1]), int(match[2])))
            position = match.end()
        items += self._literals(rendered[position:])
        self._verify(messages, items)
        return tuple(items)

    def _render(self, messages: Sequence[Message], ask: bool) -> str:
        rows: list[Any] = [
            {
                "role": message.role,
                "content": [
                    {"type": "image"}
                    if isinstance(part, Image)
                    else {"type": "text", "text": MARKER.format(message=row, part=column)}
                    for column, part in enumerate(message.content)
                ],
            }
            for row, message in enumerate(messages)
        ]
        from jinja2 import TemplateError

        arguments: dict[str, Any] = {
            "chat_template": self._template,
            "tokenize": False,
            "add_generation_prompt": ask,
        }
        try:
            return str(self._tokenizer.apply_chat_template(rows, **arguments))
        except (TemplateError, TypeError) as error:
            roles = " ".join(message.role for message in messages)
            raise ModelError(
                f"the model's chat template cannot write a conversation of {roles}: {error}"
            ) from error

    def _literals(self, text: str) -> list[Item]:
        items: list[Item] = []
        for piece in self._split.split(text):
            if piece == self._image_token:
                items.append(ImageSlot())
            elif piece in self._controls:
                items.append(Control(self._controls[piece]))
            elif piece:
                items.append(Literal(piece))
        return items

    def _verify(self, messages: Sequence[Message], items: Sequence[Item]) -> None:
        written = [(item.message, item.part) for item in items if isinstance(item, Slot)]
        expected = [
            (row, column)
            for row, message in enumerate(messages)
            for column, part in enumerate(message.content)
            if not isinstance(part, Image)
        ]
        images = sum(isinstance(item, ImageSlot) for item in items)
        placed = sum(isinstance(part, Image) for message in messages for part in message.content)
        if written != expected or images != placed:
            raise ModelError(
                "the model's chat template does not write every part once and in order: "
                f"{len(expected)} texts and {placed} images went in, {len(written)} texts and "
                f"{images} images came out"
            )
