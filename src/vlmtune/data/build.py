"""From a draft to a checked conversation: images read and decoded once, an answer chosen."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vlmtune.data.boxes import from_grid
from vlmtune.data.conversation import (
    Box,
    Conversation,
    EncodedImage,
    Message,
    Part,
    Text,
    validate,
)
from vlmtune.data.files import MAX_FILE_BYTES, ImageFiles
from vlmtune.data.formats import Draft
from vlmtune.data.media import ImagePolicy, Size, open_image
from vlmtune.data.sources import FieldError
from vlmtune.errors import FetchError, ImageError

Fetch = Callable[[str], bytes]

_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


class Builder:
    """Builds conversations; the same draft and id give the same one, in whatever order.

    Args:
        images_root: See ``ImageFiles``.
        prompt: Text put behind the image of rows that ask no question themselves.
        answer_separator: What separates several answers in one text.
        seed: Draws the answer that is trained among several.
        fetch: Opens ``http:`` and ``https:`` URLs, raising ``FetchError``; without it they are
            refused. ``data:`` URLs hold their image and open nothing.
    """

    def __init__(
        self,
        images_root: str | None = None,
        prompt: str | None = None,
        answer_separator: str | None = None,
        seed: int = 0,
        fetch: Fetch | None = None,
    ) -> None:
        self._files = ImageFiles(images_root)
        self._policy = ImagePolicy()
        self._prompt = prompt
        self._separator = answer_separator
        self._seed = seed
        self._fetch = fetch

    def build(self, draft: Draft, identity: str, base: Path | None, where: str) -> Conversation:
        """The conversation of a draft.

        Args:
            draft: What the row says.
            identity: The row's id.
            base: Folder that relative paths start from.
            where: The row's place, kept in ``meta``.

        Raises:
            DataError: With the code of what is wrong with the row.
        """
        messages, references = self._answered(draft, identity)
        images = tuple(self._read(value, base, draft.field) for value in draft.images)
        meta = {"source": where, **({"notes": list(draft.notes)} if draft.notes else {})}
        conversation = Conversation(identity, self._prompted(messages), images, references, meta)
        validate(conversation)
        _check_texts(conversation)
        sizes = [self._size(image, draft.field) for image in images]
        return replace(conversation, messages=in_pixels(conversation.messages, draft, sizes))

    def _read(self, value: Any, base: Path | None, field: str) -> EncodedImage:
        """An image from wherever the row says it is."""
        url: Any = value
        if isinstance(value, Mapping) and value.get("bytes") is None:
            url = value.get("path")
        if isinstance(url, str) and url[:5].lower() == "data:":
            return EncodedImage(_decoded(url, field))
        web = isinstance(url, str) and re.match(r"https?://", url, re.IGNORECASE) is not None
        if not web or self._fetch is None:
            return self._files.read(value, base, field)
        try:
            return EncodedImage(self._fetch(url), _without_secrets(url))
        except FetchError as fault:
            raise FieldError(
                fault.code, str(fault), field=field, value=_without_secrets(url)
            ) from None

    def _answered(self, draft: Draft, identity: str) -> tuple[tuple[Message, ...], tuple[str, ...]]:
        """The messages with an answer at their end, and all acceptable answers."""
        messages, references = draft.messages, draft.references
        last = messages[-1] if messages and messages[-1].role == "assistant" else None
        if last is not None and self._separator and self._separator in last.text:
            answers = [answer.strip() for answer in last.text.split(self._separator)]
            references = (*(answer for answer in answers if answer), *references)
            if not references:
                raise FieldError("empty_answer", f"the answer {last.text!r} has only separators")
            messages, last = messages[:-1], None
        if last is not None:
            return messages, with_answer(last, references)
        if not references:
            return messages, ()  # ``validate`` says what is missing
        references = tuple(dict.fromkeys(references))
        drawn = draw(self._seed, identity) % len(references)
        return (*messages, Message("assistant", (Text(references[drawn]),))), references

    def _prompted(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self._prompt is None:
            return messages
        for number, message in enumerate(messages):
            if message.role == "user":
                if message.text.strip():
                    return messages
                asked = Message("user", (*message.content, Text(self._prompt)))
                return (*messages[:number], asked, *messages[number + 1 :])
        return messages

    def _size(self, image: EncodedImage, field: str) -> Size:
        """The upright size of an image, which is decoded whole: training must meet none that fails.

        Raises:
            FieldError: With one of the ``image_*`` codes.
        """
        try:
            return Size(*open_image(image.data, self._policy).size)
        except ImageError as fault:
            raise FieldError(
                fault.code, str(fault), field=field, value=image.path, data=image.data
            ) from None


def with_answer(answer: Message, references: Sequence[str]) -> tuple[str, ...]:
    """All acceptable answers, the trained one among them: first, unless it has its place already.

    An answer of boxes is no text to compare with.
    """
    boxes = any(isinstance(part, Box) for part in answer.content)
    first = () if boxes or answer.text in references else (answer.text,)
    return tuple(dict.fromkeys((*first, *references)))


def _decoded(url: str, field: str) -> bytes:
    """The content of a ``data:`` URL."""
    head = _DATA_URL.match(url)
    shown = f"{url[:40]}… ({len(url):,} characters)"
    if head is None:
        raise FieldError(
            "bad_data_url",
            f"{shown} is no data:image/…;base64,… URL",
            field=field,
            value=shown,
        )
    if (len(url) - head.end()) * 3 // 4 > MAX_FILE_BYTES:
        raise FieldError(
            "image_too_large",
            f"{shown} holds more than {MAX_FILE_BYTES:,} bytes",
            field=field,
            value=shown,
        )
    try:
        return base64.b64decode("".join(url[head.end() :].split()), validate=True)
    except (ValueError, binascii.Error) as wrong:
        raise FieldError(
            "bad_data_url", f"{shown} is not valid base64: {wrong}", field=field, value=shown
        ) from None


def _without_secrets(url: str) -> str:
    """A URL without user, password and query, where keys stand."""
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
    except ValueError:
        return url.split(":", 1)[0] + "://…"


def in_pixels(
    messages: tuple[Message, ...], draft: Draft, sizes: Sequence[Size]
) -> tuple[Message, ...]:
    """The messages with all boxes in pixels of their upright image.

    Raises:
        FieldError: ``bad_box``, ``size_mismatch``.
    """

    def pixels(part: Part) -> Part:
        if not isinstance(part, Box):
            return part
        if not 0 <= part.image < len(sizes):
            raise FieldError(
                "bad_box",
                f"the box {part.xyxy} lies on image {part.image}, the row has {len(sizes)} "
                "(counted from 0)",
                field=draft.field,
                value=part.xyxy,
            )
        x1, y1, x2, y2 = part.xyxy
        if not all(map(math.isfinite, part.xyxy)) or x2 < x1 or y2 < y1:
            raise FieldError(
                "bad_box",
                f"the box {part.xyxy} is not x1 <= x2, y1 <= y2",
                field=draft.field,
                value=part.xyxy,
            )
        size = sizes[part.image]
        if draft.size is not None and draft.size != size:
            raise FieldError(
                "size_mismatch",
                f"the boxes are of an image of {draft.size.width} x {draft.size.height} pixels, "
                f"the file has {size.width} x {size.height} (upright)",
                field=draft.field,
                value=tuple(size),
            )
        if draft.box_scale is None:
            return part
        return replace(part, xyxy=from_grid(part.xyxy, size, draft.box_scale))

    return tuple(
        replace(message, content=tuple(map(pixels, message.content))) for message in messages
    )


def draw(seed: int, identity: str) -> int:
    """A large number that depends on seed and id alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{identity}".encode()).digest()[:8], "big")


def _check_texts(conversation: Conversation) -> None:
    """Raise ``bad_text`` for what UTF-8, and so parquet and every tokenizer, cannot hold."""
    labels = [part.label for part in conversation.parts() if isinstance(part, Box)]
    paths = [image.path or "" for image in conversation.images]
    texts = [message.text for message in conversation.messages]
    for text in (conversation.id, *texts, *labels, *paths, *conversation.references):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise FieldError(
                "bad_text", "the text holds half a character (a lone surrogate)", value=text
            ) from None
