"""Rows as the model sees them: tokens by kind and by the loss mask, pictures at their real size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmtune.data.conversation import Box, Conversation
from vlmtune.data.media import Size
from vlmtune.evaluation.overlay import Mark
from vlmtune.models.encode import IGNORED, Encoder, TokenKind

MOST_TOGETHER = 4  # bytes of the longest UTF-8 character, and so tokens that only decode together


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens that make text together, usually one.

    Attributes:
        text: What they say; control tokens by name.
        tokens: How many.
        kind: Template, question, answer, control or image.
        trained: Whether the loss counts them.
    """

    text: str
    tokens: int
    kind: TokenKind
    trained: bool


@dataclass(frozen=True)
class SeenImage:
    """A picture as the model sees it.

    Attributes:
        size: Of the upright original.
        resized: Of what the model sees.
        tokens: Image tokens it becomes.
        picture: The pixels that the model is given, back from their normalisation, ``(height,
            width, 3)`` uint8.
        marks: Boxes of the row on it, in pixels of ``resized``.
    """

    size: Size
    resized: Size
    tokens: int
    picture: np.ndarray
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class SeenRow:
    """A row as the model sees it.

    Attributes:
        id: The row's id.
        place: Split and position.
        input_ids: Token ids.
        labels: The id where a token is trained, -100 elsewhere.
        text_trained: What the trained tokens say.
        stretches: All tokens, in order.
        images: The pictures.
    """

    id: str
    place: str
    input_ids: list[int]
    labels: list[int]
    text_trained: str
    stretches: tuple[Stretch, ...]
    images: tuple[SeenImage, ...]

    def to_json(self) -> dict[str, Any]:
        """The keys of a row of ``vlmtune inspect --json``."""
        return {
            "id": self.id,
            "input_ids": self.input_ids,
            "labels": self.labels,
            "text_trained": self.text_trained,
            "images": [
                {"size": list(image.size), "resized": list(image.resized), "tokens": image.tokens}
                for image in self.images
            ],
        }


def see(row: Conversation, encoder: Encoder, place: str) -> SeenRow:
    """Encode a row as training does, and take it apart again.

    Raises:
        DataError: If training could not take the row either.
    """
    encoded = encoder.encode(row)
    tokens = encoded.tokens
    tokenizer = encoder.family.parts.tokenizer
    trained = tokens.ids[tokens.labels != IGNORED].tolist()
    policy = encoder.contract.image
    images = []
    pictures = encoder.family.pictures(encoded.vision, tokens.image_sizes, policy)
    policy = encoder.family.row_policy(policy, len(tokens.image_sizes))
    for index, (size, picture) in enumerate(zip(tokens.image_sizes, pictures, strict=True)):
        resized = encoder.family.resized(size, policy)
        count = encoder.family.visual_tokens(size, policy)
        images.append(SeenImage(size, resized, count, picture, _marks(row, index, size, resized)))
    return SeenRow(
        id=row.id,
        place=place,
        input_ids=tokens.ids.tolist(),
        labels=tokens.labels.tolist(),
        text_trained=str(tokenizer.decode(trained, skip_special_tokens=False)),
        stretches=tuple(_stretches(tokens.ids.tolist(), tokens.labels, row, encoder)),
        images=tuple(images),
    )


def _marks(row: Conversation, index: int, size: Size, resized: Size) -> tuple[Mark, ...]:
    across, down = resized.width / size.width, resized.height / size.height
    return tuple(
        Mark(
            part.label,
            (
                part.xyxy[0] * across,
                part.xyxy[1] * down,
                part.xyxy[2] * across,
                part.xyxy[3] * down,
            ),
        )
        for part in row.parts()
        if isinstance(part, Box) and part.image == index
    )


def _stretches(
    ids: list[int], labels: np.ndarray, row: Conversation, encoder: Encoder
) -> list[Stretch]:
    """Single tokens, but for those that are parts of one character or of one image."""
    tokenizer = encoder.family.parts.tokenizer
    kinds = encoder.kinds(row)
    found: list[Stretch] = []
    start = 0
    while start < len(ids):
        kind, counted = kinds[start], bool(labels[start] != IGNORED)
        alike = 1
        while (
            start + alike < len(ids)
            and kinds[start + alike] == kind
            and bool(labels[start + alike] != IGNORED) == counted
        ):
            alike += 1
        if kind == "image":
            found.append(Stretch("", alike, kind, counted))
            start += alike
            continue
        length = 1
        while True:
            text = str(tokenizer.decode(ids[start : start + length], skip_special_tokens=False))
            if "\ufffd" not in text or length == min(alike, MOST_TOGETHER):
                break
            length += 1
        found.append(Stretch(text, length, kind, counted))
        start += length
    return found
