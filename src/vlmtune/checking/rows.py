"""What can be seen of a row alone: its form, its pictures, its boxes, its tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmtune.checking.likeness import Likeness, likeness
from vlmtune.data.conversation import Box, Conversation, Message, Text, validate
from vlmtune.data.media import Header, ImagePolicy, Size, open_image, read_header
from vlmtune.data.rows import conversation_to_row
from vlmtune.errors import DataError
from vlmtune.models.encode import Encoder

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# What leftover markup of some model or format looks like where no model says what its own is.
MARKUP = re.compile(r"<\|[A-Za-z0-9_]{2,40}\|>|<(?:image|img|video)>")
DEEP_PNG = 16  # byte 24 of a PNG: bits a channel
OUTSIDE = 1.0  # pixels that a box may reach over an edge: rounding
ENLARGED, SHRUNK, SQUEEZED = 2.0, 1 / 3, 1.75  # of a side; of the aspect
VISIBLE = 0.95  # of the area
LONGEST_CLASS = 64  # characters; a longer answer is no class


@dataclass(frozen=True, slots=True)
class Fault:
    """A finding that does not know its row yet."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of a row."""

    text: int
    visual: int
    trained: int

    @property
    def total(self) -> int:
        """Text and image tokens."""
        return self.text + self.visual


@dataclass(frozen=True, slots=True)
class Seen:
    """What is kept of a row.

    Attributes:
        faults: What was found.
        counts: Its tokens; None where it could not be encoded, or without a model.
        pictures: A likeness of each image; None where one cannot be opened.
        question: Hash of everything before the answer, images apart.
        answer: Hash of the answer.
        characters: Length of the answer's text.
        label: The answer, where it is short enough to be a class.
    """

    faults: tuple[Fault, ...]
    counts: Counts | None
    pictures: tuple[Likeness, ...] | None
    question: int
    answer: int
    characters: int
    label: str | None


class RowCheck:
    """Looks at one row after the other; safe to share between threads.

    Args:
        encoder: Of the model that will be trained, or None.
        max_length: Rows with more tokens are ``too_long``.
    """

    def __init__(self, encoder: Encoder | None, max_length: int) -> None:
        self._encoder = encoder
        self._max_length = max_length
        self._policy = encoder.contract.image if encoder else ImagePolicy()

    def __call__(self, row: Conversation) -> Seen:
        """Look at a row."""
        faults: list[Fault] = []
        pictures, sizes = self._pictures(row, faults)
        sound = pictures is not None
        try:
            validate(row)
        except DataError as error:
            faults.append(Fault(error.code, str(error)))
            sound = False
        if sizes is not None:
            boxes = list(box_faults(row, sizes))
            faults += boxes
            sound = sound and not any(fault.code == "box_without_image" for fault in boxes)
        faults += self._control_tokens(row)
        counts = self._count(row, sizes or (), faults) if sound else None
        answer, before = _answer(row)
        text = answer.text.strip() if answer else ""
        return Seen(
            faults=tuple(faults),
            counts=counts,
            pictures=pictures,
            question=_digest(before),
            answer=_digest((answer,) if answer else ()),
            characters=len(text),
            label=text if _is_short(answer) else None,
        )

    def _pictures(
        self, row: Conversation, faults: list[Fault]
    ) -> tuple[tuple[Likeness, ...] | None, tuple[Size, ...] | None]:
        pictures: list[Likeness] = []
        sizes: list[Size] = []
        for number, image in enumerate(row.images):
            name = f"image {number + 1}: " if len(row.images) > 1 else ""
            try:
                header = read_header(image.data, self._policy)
                sizes.append(header.size)
                picture = open_image(image.data, self._policy)
                notes = list(image_notes(image.data, header, picture, self._policy))
                if self._encoder is not None:
                    notes += size_notes(header.size, self._encoder, len(row.images))
            except DataError as error:
                faults.append(Fault(error.code, name + str(error)))
                continue
            faults += [Fault(note.code, name + note.message) for note in notes]
            pictures.append(likeness(picture))
        whole = len(pictures) == len(row.images)
        return (
            tuple(pictures) if whole else None,
            tuple(sizes) if len(sizes) == len(row.images) else None,
        )

    def _count(
        self, row: Conversation, sizes: Sequence[Size], faults: list[Fault]
    ) -> Counts | None:
        if self._encoder is None:
            return None
        try:
            tokens = self._encoder.tokens(row, sizes=sizes)
        except DataError as error:
            faults.append(Fault(error.code, str(error)))
            return None
        counts = Counts(len(tokens) - tokens.visual, tokens.visual, tokens.trained)
        if counts.total > self._max_length:
            faults.append(
                Fault(
                    "too_long",
                    f"{counts.total:,} tokens ({counts.visual:,} of images, {counts.text:,} of "
                    f"text), data.max_length is {self._max_length:,}",
                )
            )
        return counts

    def _control_tokens(self, row: Conversation) -> Iterator[Fault]:
        for number, message in enumerate(row.messages):
            for part in message.content:
                text = part.text if isinstance(part, Text) else ""
                text = part.label if isinstance(part, Box) else text
                found = list(dict.fromkeys(MARKUP.findall(text)))
                if self._encoder is not None:
                    found += [
                        token
                        for token in self._encoder.control_tokens_in(text)
                        if token not in found
                    ]
                for token in found:
                    yield Fault(
                        "control_token",
                        f"{token!r} stands in the {message.role}'s text (turn {number + 1}); it "
                        "is encoded as plain text",
                    )


def image_notes(
    data: bytes, header: Header, picture: Picture, policy: ImagePolicy
) -> Iterator[Fault]:
    """What happens to a picture on its way to RGB that its owner may not expect."""
    if header.transparent and _shows_background(data, picture, policy):
        yield Fault("transparent", f"transparency is composed on {policy.background}")
    if header.frames > 1:
        yield Fault("animated", f"only the first of {header.frames} frames is seen")
    if header.orientation != 1:
        yield Fault("rotated", f"EXIF orientation {header.orientation} is applied")
    deep_png = header.format == "PNG" and len(data) > 24 and data[24] == DEEP_PNG
    if header.mode.startswith(("I", "F")) or deep_png:
        yield Fault("sixteen_bit", f"mode {header.mode}, {header.format}, is scaled to 8 bits")
    if header.mode == "CMYK":
        yield Fault("cmyk", "CMYK is converted by the plain formula, without a colour profile")


def _shows_background(data: bytes, picture: Picture, policy: ImagePolicy) -> bool:
    """Whether any pixel is transparent: an alpha channel is often opaque everywhere."""
    other = "#000000" if policy.background != "#000000" else "#ffffff"
    elsewhere = open_image(data, policy.model_copy(update={"background": other}))
    return picture.tobytes() != elsewhere.tobytes()


def size_notes(size: Size, encoder: Encoder, images: int = 1) -> Iterator[Fault]:
    """What the family's resize does to a picture of ``size`` pixels in a row of so many.

    Raises:
        ImageError: If the family refuses it.
    """
    policy = encoder.family.row_policy(encoder.contract.image, images)
    resized = encoder.family.resized(size, policy)
    visible = encoder.family.visible(size, policy)
    scales = resized.width / size.width, resized.height / size.height
    words = f"{size.width} x {size.height} becomes {resized.width} x {resized.height} pixels"
    if min(scales) > ENLARGED:
        yield Fault("image_too_small", words)
    if max(scales) < SHRUNK:
        yield Fault("image_shrunk", words)
    if max(scales) / min(scales) > SQUEEZED:
        yield Fault("image_squeezed", words)
    if visible < VISIBLE:
        yield Fault("image_cropped", f"{words}, of which the model sees the middle {visible:.0%}")


def box_faults(row: Conversation, sizes: Sequence[Size]) -> Iterator[Fault]:
    """Boxes that do not lie on their image."""
    for part in row.parts():
        if not isinstance(part, Box):
            continue
        x1, y1, x2, y2 = part.xyxy
        words = f"box {part.label!r} ({x1:.6g}, {y1:.6g}, {x2:.6g}, {y2:.6g})"
        if not 0 <= part.image < len(sizes):
            yield Fault(
                "box_without_image",
                f"{words} is on image {part.image + 1}, the row has {len(sizes)}",
            )
            continue
        width, height = sizes[part.image]
        if not (x1 < x2 and y1 < y2):
            yield Fault("box_inverted", f"{words} has no area; expected x1 < x2 and y1 < y2")
        beyond = max(max(x1, x2) - width, max(y1, y2) - height)
        if min(x1, y1) < -OUTSIDE or beyond > OUTSIDE:
            yield Fault("box_outside", f"{words} leaves its image of {width} x {height} pixels")


def _answer(row: Conversation) -> tuple[Message | None, tuple[Message, ...]]:
    """The last assistant turn, and what stands before it."""
    if row.messages and row.messages[-1].role == "assistant":
        return row.messages[-1], row.messages[:-1]
    return None, row.messages


def _is_short(answer: Message | None) -> bool:
    return (
        answer is not None
        and all(isinstance(part, Text) for part in answer.content)
        and len(answer.text) <= LONGEST_CLASS
    )


def _digest(messages: tuple[Message, ...]) -> int:
    """64 bits of what turns say, blanks at their ends aside."""
    written: list[Any] = conversation_to_row(Conversation("", messages))["messages"]
    for message in written:
        for part in message["content"]:
            if part["type"] == "text":
                part["text"] = part["text"].strip()
    canonical = json.dumps(written, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(canonical, digest_size=8).digest(), "big")
