"""A conversation that goes on: what was said, with its pictures, and the next question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlmtune.data.conversation import Conversation, EncodedImage, Image, Message, Part, Text
from vlmtune.serving.events import Delta, Ended
from vlmtune.serving.front import Front
from vlmtune.serving.rows import Answer
from vlmtune.serving.settings import Settings


class Dialogue:
    """One person's history with a model.

    Args:
        engine: What answers.
        settings: How.
        model: Which of the served models; None takes the first.

    Attributes:
        last: The last answer, whole, or None.
    """

    def __init__(self, engine: Front, settings: Settings, model: str | None = None) -> None:
        self._engine, self._model = engine, model
        self._settings = settings.model_copy(update={"stream": True, "n": 1})
        self._messages: tuple[Message, ...] = ()
        self._images: tuple[EncodedImage, ...] = ()
        self.last: Ended | None = None

    def clear(self) -> None:
        """Begin anew."""
        self._messages, self._images, self.last = (), (), None

    def ask(self, text: str, images: Sequence[EncodedImage] = ()) -> Iterator[str]:
        """Ask with pictures before the text; the pieces of the answer.

        What was said so far stays in the history where the answer is broken off; a question that
        fails leaves none.

        Raises:
            VlmtuneError: If there is no answer.
        """
        parts: list[Part] = [Image(len(self._images) + place) for place in range(len(images))]
        parts += [Text(text)] if text else []
        messages = (*self._messages, Message("user", tuple(parts)))
        pictures = (*self._images, *images)
        answer = self._engine.ask(
            Conversation("chat", messages, pictures), self._settings, model=self._model
        )
        return self._listen(answer, messages, pictures)

    def _listen(
        self, answer: Answer, messages: tuple[Message, ...], pictures: tuple[EncodedImage, ...]
    ) -> Iterator[str]:
        said, began = "", False
        try:
            for event in answer:
                began = True
                if isinstance(event, Delta):
                    said += event.text
                    yield event.text
                elif isinstance(event, Ended):
                    said, self.last = event.text, event
        finally:
            if began:
                self._messages = (*messages, Message("assistant", (Text(said),)))
                self._images = pictures
