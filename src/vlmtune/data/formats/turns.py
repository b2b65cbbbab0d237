"""Lists of turns, in whatever spelling, to messages; and images handed out to their places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune.data.conversation import Image, Message, Part, Role, Text
from vlmtune.data.formats.draft import Draft, Row, as_list, cell, identity, tidy
from vlmtune.data.sources import FieldError

# Roles as the formats call them. A tool's turns are neither asked nor answered by anybody here.
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}

IMAGE_MARK = "<image>"
OTHER_MEDIA = ("video", "videos", "audio", "audios")


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn: who, what, and where in the row it stands."""

    role: Role
    value: Any
    field: str

    @property
    def text(self) -> str:
        """The turn's text.

        Raises:
            FieldError: ``missing_field``: it holds something else.
        """
        if not isinstance(self.value, str):
            raise FieldError(
                "missing_field",
                f"{self.field} holds {type(self.value).__name__}, expected a text",
                field=self.field,
                value=self.value,
            )
        return self.value


class Shelf:
    """A row's images, handed out in the order of their places.

    Args:
        row: The row.
        names: Columns that images may be in.
    """

    def __init__(self, row: Row, *names: str) -> None:
        self.field = next((name for name in names if row.get(name) is not None), "")
        self._images = list(as_list(row.get(self.field)))
        self._placed = 0
        for name in OTHER_MEDIA:
            if as_list(row.get(name)):
                raise FieldError(
                    "media_unsupported",
                    f"the row has {name}; only images can be trained on",
                    field=name,
                    value=row[name],
                )

    @property
    def images(self) -> tuple[Any, ...]:
        """All images, in the order of their places."""
        return tuple(self._images)

    @property
    def left(self) -> int:
        """Images without a place so far."""
        return len(self._images) - self._placed

    def add(self, image: Any) -> Image:
        """Place an image that stands in the text itself."""
        self._images.insert(self._placed, image)
        return self._place()

    def take(self, field: str) -> Image:
        """Place the row's next image.

        Raises:
            FieldError: ``image_mismatch``: there is none left.
        """
        if not self.left:
            raise FieldError(
                "image_mismatch",
                f"{field} places image {self._placed + 1}, but the row has {len(self._images)}; "
                "expected a placeholder for each image",
                field=field,
            )
        return self._place()

    def take_all(self) -> tuple[Image, ...]:
        """Place all images that are left."""
        return tuple(self._place() for _ in range(self.left))

    def _place(self) -> Image:
        self._placed += 1
        return Image(self._placed - 1)

    def check(self) -> None:
        """Raise ``image_mismatch`` if an image has no place."""
        if self.left:
            raise FieldError(
                "image_mismatch",
                f"the row has {len(self._images)} images and places {self._placed}; expected a "
                "placeholder for each",
                field=self.field,
            )


def turns_of(row: Row, key: str) -> list[Turn]:
    """The turns in a column, whether they say ``from``/``value`` or ``role``/``content``.

    Raises:
        FieldError: ``missing_field``, ``bad_row``, ``bad_role``, ``loss_masked``.
    """
    turns = cell(row, key)
    if not isinstance(turns, list):
        raise FieldError(
            "bad_row", f"{key!r} holds {type(turns).__name__}, expected a list of turns", field=key
        )
    return [_turn(turn, f"{key}[{number}]") for number, turn in enumerate(turns)]


def _turn(turn: Any, field: str) -> Turn:
    if not isinstance(turn, dict):
        raise FieldError(
            "missing_field", f"{field} is no turn with a role and a text", field=field, value=turn
        )
    role_key = "from" if turn.get("from") is not None else "role"
    value_key = "value" if turn.get("value") is not None else "content"
    role = turn.get(role_key)
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise FieldError(
            "bad_role",
            f"{field} has {role_key!r} = {role!r}; expected one of {', '.join(ROLES)}",
            field=f"{field}.{role_key}",
            value=role,
        )
    for key in ("loss", "weight"):
        if turn.get(key) in (0, False) and turn.get(key) is not None and known == "assistant":
            raise FieldError(
                "loss_masked",
                f"{field} says {key} = {turn[key]!r}: an answer that is not to be trained; every "
                "answer of a row is",
                field=f"{field}.{key}",
                value=turn[key],
            )
    return Turn(known, turn.get(value_key), f"{field}.{value_key}")


def without_leading_answer(turns: list[Turn]) -> tuple[list[Turn], tuple[str, ...]]:
    """The turns from the user's first on: an answer to nothing is dropped, and noted."""
    start = 1 if turns and turns[0].role == "system" else 0
    if len(turns) > start and turns[start].role == "assistant":
        note = f"left out {turns[start].field}: an answer before the first question"
        return turns[:start] + turns[start + 1 :], (note,)
    return turns, ()


def messages_of(
    turns: Sequence[Turn], parts: Callable[[Turn], Iterable[Part]]
) -> tuple[Message, ...]:
    """The messages of turns.

    Args:
        turns: In their order.
        parts: Takes a turn's content apart.

    Raises:
        FieldError: ``empty_question``, or what ``parts`` finds.
    """
    messages = []
    for turn in turns:
        content = tidy(parts(turn))
        blank = all(isinstance(part, Text) and not part.text.strip() for part in content)
        if turn.role == "user" and blank:
            raise FieldError(
                "empty_question", f"the user's turn {turn.field} is empty", field=turn.field
            )
        messages.append(Message(turn.role, content))
    return tuple(messages)


def placeholders(turn: Turn, shelf: Shelf) -> tuple[Part, ...]:
    """A text with ``<image>`` where an image goes. An answer's ``<image>`` is text."""
    if turn.role == "assistant":
        return (Text(turn.text),)
    first, *others = turn.text.split(IMAGE_MARK)
    parts: list[Part] = [Text(first)]
    for text in others:
        parts += (shelf.take(turn.field), Text(text))
    return tuple(parts)


def draft_of(
    row: Row,
    turns: Sequence[Turn],
    shelf: Shelf,
    parts: Callable[[Turn], Iterable[Part]],
    notes: tuple[str, ...] = (),
) -> Draft:
    """The draft of a row whose every image must have its place in the turns."""
    messages = messages_of(turns, parts)
    shelf.check()
    field = shelf.field or (turns[0].field if turns else "")
    return Draft(messages, shelf.images, id=identity(row), field=field, notes=notes)
