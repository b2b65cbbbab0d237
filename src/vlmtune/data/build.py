"""From a draft to a checked conversation: images read and decoded once, an answer chosen."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vlmtune.data.conversation import Box, Conversation, EncodedImage, Message, Text, validate
from vlmtune.data.files import ImageFiles
from vlmtune.data.formats import Draft
from vlmtune.data.media import ImagePolicy, open_image
from vlmtune.data.sources import FieldError
from vlmtune.errors import ImageError


class Builder:
    """Builds conversations; the same draft and id give the same one, in whatever order.

    Args:
        images_root: See ``ImageFiles``.
        prompt: Text put behind the image of rows that ask no question themselves.
        answer_separator: What separates several answers in one text.
        seed: Draws the answer that is trained among several.
    """

    def __init__(
        self,
        images_root: str | None = None,
        prompt: str | None = None,
        answer_separator: str | None = None,
        seed: int = 0,
    ) -> None:
        self._files = ImageFiles(images_root)
        self._policy = ImagePolicy()
        self._prompt = prompt
        self._separator = answer_separator
        self._seed = seed

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
        images = tuple(self._files.read(value, base, draft.field) for value in draft.images)
        conversation = Conversation(
            identity, self._prompted(messages), images, references, {"source": where}
        )
        validate(conversation)
        _check_texts(conversation)
        for image in images:
            self._check_image(image, draft.field)
        return conversation

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
            if not any(isinstance(part, Box) for part in last.content):
                references = (last.text, *references)
            return messages, tuple(dict.fromkeys(references))
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

    def _check_image(self, image: EncodedImage, field: str) -> None:
        try:
            open_image(image.data, self._policy)
        except ImageError as fault:
            raise FieldError(
                fault.code, str(fault), field=field, value=image.path, data=image.data
            ) from None


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
