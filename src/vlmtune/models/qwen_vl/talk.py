"""Talking with Qwen-VL-Chat: several turns, pictures anywhere, answers word by word, boxes drawn.

Images are given as images (a file's path or bytes, or a picture). Nothing in a text opens anything.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlmtune.data.boxes import from_grid
from vlmtune.data.conversation import Box, Conversation, EncodedImage, Image, Message, Part, Text
from vlmtune.data.media import open_image, read_header
from vlmtune.errors import ImageError, RowError, UsageError
from vlmtune.models.decode import Decoding
from vlmtune.models.encode import Encoder
from vlmtune.models.qwen_vl.boxes import GRID, draw_on_latest
from vlmtune.models.qwen_vl.chat import WINDOW, Chat

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from transformers import PreTrainedModel

    ImageLike = str | Path | bytes | Picture | EncodedImage
    Question = str | Sequence[Mapping[str, Any]]

MAX_NEW_TOKENS = 512  # of the model's generation_config.json

Pick = Callable[[Tensor], Tensor]


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each row, ``(rows,)`` of ``(rows, vocabulary)``."""
    return logits.argmax(dim=-1)


class Talk:
    """A conversation that grows by a question and its answer.

    Args:
        model: The model in evaluation mode, adapter included.
        encoder: Its encoder.
        conversation: What was said before.
        window: Tokens of history that the model is shown.
        max_new_tokens: Longest answer.
        pick: Chooses the next token of logits ``(1, vocabulary)``.

    Attributes:
        conversation: All that was said, its images included.
        answer: The last answer, tags of boxes kept.
        ids: Its token ids, the end included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        conversation: Conversation | None = None,
        *,
        window: int = WINDOW,
        max_new_tokens: int = MAX_NEW_TOKENS,
        pick: Pick = likeliest,
    ) -> None:
        self.conversation = conversation or Conversation("talk", ())
        self.answer = ""
        self.ids: tuple[int, ...] = ()
        self._chat = Chat(encoder, window=window)
        self._model, self._encoder = model, encoder
        self._max_new_tokens, self._pick = max_new_tokens, pick

    def ask(self, question: Question, images: Sequence[ImageLike] = ()) -> str:
        """Ask, and wait for the answer; for the arguments see ``stream``."""
        for _ in self.stream(question, images):
            pass
        return self.answer

    def stream(self, question: Question, images: Sequence[ImageLike] = ()) -> Iterator[str]:
        """Ask, and hear the answer while it is spoken: each text is all that was said so far.

        A question whose answer was not heard to its end is forgotten.

        Args:
            question: A text; or elements as ``from_list_format`` takes them, ``{"image": …}``,
                ``{"text": …}``, ``{"ref": PHRASE, "box": [[x1, y1, x2, y2], …]}``, images as below.
            images: Images that stand before a text: paths, bytes of files, or pictures.

        Raises:
            ImageError: If an image cannot be opened.
            RowError: ``bad_markup``: an element is none of the three kinds.
        """
        said = [{"text": question}] if isinstance(question, str) else question
        asked = self._asked([*({"image": image} for image in images), *said])
        decoding = Decoding(self._model, self._encoder, [self._chat.context(asked)])
        ids: list[int] = []
        while True:
            token = self._pick(decoding.logits)
            ids.append(int(token))
            ended = ids[-1] in self._chat.stop_ids
            if ended or len(ids) == self._max_new_tokens:
                break
            yield self._chat.so_far(ids)
            decoding.step(token)
        self.ids, self.answer = tuple(ids), self._chat.answer(ids)
        self.conversation = self._chat.reply(asked, ids)
        yield self.answer

    def drawn(self, *, font: str | Path | None = None) -> Picture | None:
        """The boxes of the last answer on the latest picture; None where there are none.

        Args:
            font: A font file for the labels.
        """
        policy = self._encoder.contract.image
        latest = [open_image(image.data, policy) for image in self.conversation.images[-1:]]
        return draw_on_latest(self.answer, latest, font=font)

    def _asked(self, elements: Sequence[Mapping[str, Any]]) -> Conversation:
        """The conversation with a question."""
        parts: list[Part] = []
        images = list(self.conversation.images)
        for element in elements:
            if "image" in element:
                parts.append(Image(len(images)))
                images.append(encoded(element["image"]))
            elif "text" in element:
                parts.append(Text(str(element["text"])))
            else:
                parts += self._boxes(element, images)
        turn = Message("user", tuple(parts))
        said = self.conversation.messages
        return replace(self.conversation, messages=(*said, turn), images=tuple(images))

    def _boxes(self, element: Mapping[str, Any], images: Sequence[EncodedImage]) -> list[Part]:
        """Boxes of a question, which lie on the latest picture."""
        try:
            corners = [(x1, y1, x2, y2) for x1, y1, x2, y2 in element["box"]]
        except (KeyError, TypeError, ValueError) as error:
            raise RowError(
                "bad_markup",
                f"found the element {dict(element)!r}; expected {{'image': …}}, {{'text': …}} or "
                "{'box': [[x1, y1, x2, y2], …]} with or without 'ref'",
            ) from error
        if not images:
            raise RowError("bad_markup", f"found the box {corners}, and no image before it")
        size = read_header(images[-1].data, self._encoder.contract.image).size
        label, index = str(element.get("ref", "")), len(images) - 1
        return [Box(index, label, from_grid(each, size, GRID)) for each in corners]


def encoded(image: Any) -> EncodedImage:
    """An image as a conversation holds it.

    Args:
        image: A file's path, a file's bytes, or a picture of Pillow's.

    Raises:
        ImageError: If the file cannot be read.
        UsageError: If it is something else.
    """
    from PIL.Image import Image as Picture

    if isinstance(image, EncodedImage):
        return image
    if isinstance(image, bytes):
        return EncodedImage(image)
    if isinstance(image, Picture):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return EncodedImage(stream.getvalue())
    if not isinstance(image, str | Path):
        raise UsageError(
            f"an image: found a {type(image).__name__}, expected a path, bytes of a file, or a "
            "picture of Pillow's"
        )
    try:
        return EncodedImage(Path(image).read_bytes(), str(image))
    except OSError as error:
        raise ImageError(
            "image_missing", f"the image {image} cannot be read: {error.strerror or error}"
        ) from error
