"""A chat template rendered once for a shape of conversation, with slots where the texts go.

The template is rendered with a marker in the place of every text. What it writes around the
markers is the template's own; what goes into a slot is a user's. Only the template's own text may
become control tokens: a user's ``<|im_end|>`` stays seven characters of text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmtune.data.conversation import Image, Message, Text
from vlmtune.errors import ModelError
from vlmtune.models.plain_text import control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A run of neighbouring texts is one text to the template, as its author would have written it. The
# guards at its ends are white space to ``strip``: where they are gone, the template trims.
GUARD = "\x1f"
MARKER = "\ue000{message}\ue001{part}\ue002"
MARKERS = re.compile("\ue000(\\d+)\ue001(\\d+)\ue002")
RUN = re.compile(f"({GUARD}?)((?:\ue000\\d+\ue001\\d+\ue002)+)({GUARD}?)")
MOST_SHAPES = 1024  # remembered: whoever asks a server chooses the shapes that it sees


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that the template writes.

    Attributes:
        text: The text.
        lead: Whether it stands between the place where an answer is asked for and the answer: the
            model has to write it, e.g. the space of ``Assistant: yes`` after ``Assistant:``.
    """

    text: str
    lead: bool = False


@dataclass(frozen=True, slots=True)
class Control:
    """A control token that the template writes; ``lead`` as for ``Literal``."""

    id: int
    lead: bool = False


@dataclass(frozen=True, slots=True)
class Opening:
    """Ids that the tokenizer puts before a text of its own accord; to the text they are nothing."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place of the next image."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a part that is not an image: ``messages[message].content[part]``.

    Attributes:
        message: Index of the turn.
        part: Index of the part in it.
        trim_start: Whether the template strips white space before the part.
        trim_end: Whether it strips white space after it.
        last: Whether it is the last part of its turn.
    """

    message: int
    part: int
    trim_start: bool = False
    trim_end: bool = False
    last: bool = False


Item = Literal | Control | Opening | ImageSlot | Slot
Shape = tuple[tuple[str, tuple[bool, ...]], ...]
Style = Callable[[Message, int], Any]


def shape_of(messages: Sequence[Message]) -> Shape:
    """What a skeleton depends on: the roles, and which parts are images."""
    return tuple(
        (message.role, tuple(isinstance(part, Image) for part in message.content))
        for message in messages
    )


class Template:
    """A chat template and the control tokens that it may write.

    Args:
        tokenizer: The model's tokenizer.
        template: The Jinja text.
        image: What the template writes in the place of an image.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, image: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._image = image
        self._controls = control_tokens(tokenizer.backend_tokenizer)
        longest_first = sorted({*self._controls, image}, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._opening = _opening(tokenizer)
        self._cache: dict[tuple[Shape, bool], tuple[Item, ...]] = {}
        # Templates differ in what they take for a turn's content; the first that comes out whole.
        self._styles: tuple[Style, ...] = (_as_parts, self._as_text_or_parts, self._as_text)

    def skeleton(self, messages: Sequence[Message], *, ask: bool) -> tuple[Item, ...]:
        """The items of a conversation of this shape.

        Args:
            messages: The turns; only their roles and the kinds of their parts matter.
            ask: Whether to end with the opening of an assistant turn (the generation prompt).

        Raises:
            ModelError: If the template drops, repeats or reorders a part, or asks for an answer in
                other words than it writes one.
        """
        key = (shape_of(messages), ask)
        items = self._cache.get(key)
        if items is None:
            items = self._build(messages, ask)
            if len(self._cache) >= MOST_SHAPES:
                self._cache.clear()
            self._cache[key] = items
        return items

    def exchange(self) -> tuple[str, int | None]:
        """How an answer begins and ends in the plainest conversation.

        Returns:
            What the model itself writes before an answer, and the control token that the template
            closes it with, or None where the template writes none.
        """
        plain = (Message("user", (Text(""),)), Message("assistant", (Text(""),)))
        items = self.skeleton(plain, ask=False)
        answer = items.index(_answer(items))
        lead = "".join(
            item.text for item in items[:answer] if isinstance(item, Literal) and item.lead
        )
        closing = next((item.id for item in items[answer:] if isinstance(item, Control)), None)
        return lead, closing

    def _build(self, messages: Sequence[Message], ask: bool) -> tuple[Item, ...]:
        failures = []
        for style in self._styles:
            try:
                rendered = self._as_asked(messages, self._render(messages, ask, style), style)
                leads = self._leads(messages, rendered, style)
                items = self._items(messages, rendered, leads)
                _verify(messages, items)
            except ModelError as error:
                failures.append(error)
            else:
                return items
        raise failures[0]

    def _items(
        self, messages: Sequence[Message], rendered: str, leads: dict[int, int]
    ) -> tuple[Item, ...]:
        bos = self._tokenizer.bos_token
        items: list[Item] = []
        if not (isinstance(bos, str) and rendered.startswith(bos)):
            items.append(Opening(self._opening))
        position = 0
        for run in RUN.finditer(rendered):
            items += self._between(rendered, position, run.start(), leads)
            slots = [(int(match[1]), int(match[2])) for match in MARKERS.finditer(run[2])]
            for place, (message, part) in enumerate(slots):
                items.append(
                    Slot(
                        message,
                        part,
                        trim_start=place == 0 and not run[1],
                        trim_end=place == len(slots) - 1 and not run[3],
                        last=part == _last_text(messages[message]),
                    )
                )
            position = run.end()
        return (*items, *self._between(rendered, position, len(rendered), leads))

    def _between(self, rendered: str, start: int, end: int, leads: dict[int, int]) -> list[Item]:
        """Items of the template's own text before a run of slots."""
        lead = leads.get(end, end)
        return [
            *self._literals(rendered[start : max(start, lead)], lead=False),
            *self._literals(rendered[max(start, lead) : end], lead=True),
        ]

    def _as_asked(self, messages: Sequence[Message], rendered: str, style: Style) -> str:
        """A rendering whose last answer begins as it is asked for, where only blanks differ.

        Some templates write a blank between the role and the answer's line, and ask for an answer
        without it: what is asked is what is served, and has to be what is trained.
        """
        last = len(messages) - 1
        if messages[last].role != "assistant":
            return rendered
        answer = next((run for run in RUN.finditer(rendered) if _belongs(run, last)), None)
        if answer is None:
            return rendered
        asked, written = self._render(messages[:last], True, style), rendered[: answer.start()]
        if written.startswith(asked) or asked.split() != written.split():
            return rendered
        return asked + rendered[answer.start() :]

    def _leads(self, messages: Sequence[Message], rendered: str, style: Style) -> dict[int, int]:
        """Where each answer is asked for: start of its first slot -> end of the asking."""
        first: dict[int, int] = {}
        for run in RUN.finditer(rendered):
            match = MARKERS.search(run[2])
            assert match is not None
            first.setdefault(int(match[1]), run.start())
        leads = {}
        for index, start in first.items():
            if messages[index].role != "assistant":
                continue
            asked = self._render(messages[:index], True, style)
            if rendered.startswith(asked):
                leads[start] = len(asked)
            elif index == len(messages) - 1:
                raise ModelError(
                    "the model's chat template asks for an answer in other words than it writes "
                    f"one: it asks with {asked[-60:]!r} and writes {rendered[:start][-60:]!r}. A "
                    "model trained on the second would be served the first"
                )
        return leads

    def _render(self, messages: Sequence[Message], ask: bool, style: Style) -> str:
        from jinja2 import TemplateError

        rows = [
            {"role": message.role, "content": style(message, row)}
            for row, message in enumerate(messages)
        ]
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

    def _as_text_or_parts(self, message: Message, row: int) -> Any:
        if any(isinstance(part, Image) for part in message.content):
            return _as_parts(message, row)
        return self._as_text(message, row)

    def _as_text(self, message: Message, row: int) -> Any:
        return "".join(
            self._image if part["type"] == "image" else part["text"]
            for part in _as_parts(message, row)
        )

    def _literals(self, text: str, *, lead: bool) -> list[Item]:
        items: list[Item] = []
        for piece in self._split.split(text):
            if piece == self._image:
                items.append(ImageSlot())
            elif piece in self._controls:
                items.append(Control(self._controls[piece], lead))
            elif piece:
                items.append(Literal(piece, lead))
        return items


def _as_parts(message: Message, row: int) -> list[dict[str, str]]:
    """Content as a list of parts, neighbouring texts and boxes as one text."""
    parts: list[dict[str, str]] = []
    for column, part in enumerate(message.content):
        if isinstance(part, Image):
            parts.append({"type": "image"})
            continue
        marker = MARKER.format(message=row, part=column)
        if parts and parts[-1]["type"] == "text":
            parts[-1]["text"] = parts[-1]["text"][:-1] + marker + GUARD
        else:
            parts.append({"type": "text", "text": GUARD + marker + GUARD})
    return parts


def _belongs(run: re.Match[str], message: int) -> bool:
    """Whether a run of slots is of a turn."""
    first = MARKERS.search(run[2])
    return first is not None and int(first[1]) == message


def _last_text(message: Message) -> int:
    places = [place for place, part in enumerate(message.content) if not isinstance(part, Image)]
    return places[-1]


def _answer(items: Sequence[Item]) -> Slot:
    return next(item for item in items if isinstance(item, Slot) and item.message == 1)


def _opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that the tokenizer puts before every text, a beginning-of-sequence token or nothing."""
    plain: Any = tokenizer("x", add_special_tokens=False)["input_ids"]
    full: Any = tokenizer("x")["input_ids"]
    return tuple(full[: full.index(plain[0])]) if plain and plain[0] in full else ()


def _verify(messages: Sequence[Message], items: Sequence[Item]) -> None:
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
