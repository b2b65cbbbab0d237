"""Rows made up to ask a processor or a model what it does with them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlmtune.data.conversation import Conversation, EncodedImage, Image, Message, Part, Text
from vlmtune.data.media import Size

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


def gradient(size: Size, seed: int = 0) -> Picture:
    """A picture no two parts of which are equal, so that its views can be told apart."""
    from PIL import Image as Pictures

    down = np.linspace(0, 255, size.height)[:, None]
    across = np.linspace(0, 255, size.width)[None]
    channels = np.stack([down + 0 * across, 0 * down + across, (down + across) / 2], axis=-1)
    return Pictures.fromarray(np.roll(channels, seed, axis=-1).astype(np.uint8))


def probe_row(
    content: Sequence[str | Size], answer: str | None = None, seed: int = 0
) -> Conversation:
    """A question of texts and pictures, given by their sizes, and its answer if there is one."""
    parts: list[Part] = []
    images: list[EncodedImage] = []
    for part in content:
        if isinstance(part, str):
            parts.append(Text(part))
            continue
        parts.append(Image(len(images)))
        buffer = io.BytesIO()
        gradient(part, seed).save(buffer, "PNG")
        images.append(EncodedImage(buffer.getvalue()))
    messages = [Message("user", tuple(parts))]
    if answer is not None:
        messages.append(Message("assistant", (Text(answer),)))
    return Conversation("probe", tuple(messages), tuple(images))
