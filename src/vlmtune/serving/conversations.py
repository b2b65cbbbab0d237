"""From a request to the conversation that the engine is asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vlmtune.data.conversation import Conversation, EncodedImage, Image, Message, Part, Role, Text
from vlmtune.errors import FetchError
from vlmtune.fetch import FetchLimits, Network, decode_data_url, fetch_image_bytes, shown
from vlmtune.fetch.network import INTERNET
from vlmtune.fetch.urls import is_data_url
from vlmtune.serving.errors import BadRequestError, TooLargeError
from vlmtune.serving.limits import Limits
from vlmtune.serving.schemas import ChatMessage, ChatRequest, TextPart


@dataclass(frozen=True)
class Images:
    """Where images may come from.

    Attributes:
        limits: How large they may be.
        domains: Hosts whose addresses are opened, and those below them; empty opens none, ``*`` any
            that is public.
        network: Look-up and connection; another one is for tests only.
    """

    limits: Limits
    domains: frozenset[str] = frozenset()
    network: Network = field(default=INTERNET)

    def held(self, url: str, param: str) -> bytes | None:
        """The image that a data URL holds; None for an address that has to be fetched.

        Raises:
            BadRequestError: If it is neither, or this server opens no addresses.
            TooLargeError: If the image is too large.
        """
        if is_data_url(url):
            with_limit = self.limits.max_image_bytes
            try:
                return decode_data_url(url, with_limit)
            except FetchError as error:
                raise _refused(error, param) from None
        if not self.domains:
            raise BadRequestError(
                f"{param}: {shown(url)} is not opened: this server opens no addresses. Send the "
                "image itself, as a data URL: data:image/png;base64,…",
                param=param,
                code="url_not_allowed",
            )
        return None

    def fetch(self, url: str, param: str) -> bytes:
        """The image at an address.

        Raises:
            BadRequestError: If it may not be opened, or gives nothing.
            TooLargeError: If it is too large.
        """
        limits = FetchLimits(
            max_bytes=self.limits.max_image_bytes,
            total_seconds=self.limits.fetch_seconds,
            domains=None if "*" in self.domains else self.domains,
        )
        try:
            return fetch_image_bytes(url, limits, network=self.network)
        except FetchError as error:
            raise _refused(error, param) from None


@dataclass
class Draft:
    """A conversation whose images may still have to be fetched.

    Attributes:
        messages: The turns.
        images: The images in reading order; None where it has to be fetched.
        addresses: Place in ``images``, address and parameter of each that has to be fetched.
    """

    messages: tuple[Message, ...] = ()
    images: list[bytes | None] = field(default_factory=list)
    addresses: list[tuple[int, str, str]] = field(default_factory=list)

    def finished(self, name: str) -> Conversation:
        """The conversation."""
        images = tuple(EncodedImage(data) for data in self.images if data is not None)
        assert len(images) == len(self.images)
        return Conversation(name, self.messages, images)


def draft(request: ChatRequest, images: Images, *, has_prompt: bool) -> Draft:
    """The turns of a request, with the images that it holds itself.

    Args:
        request: The request.
        images: Where images may come from.
        has_prompt: Whether the model has a prompt for turns of images alone.

    Raises:
        BadRequestError: If a turn is empty, or an image cannot be had.
        TooLargeError: If there are too many images or characters, or an image is too large.
    """
    _judge_size(request.messages, images.limits)
    drafted = Draft()
    messages = []
    for place, message in enumerate(request.messages):
        where = f"messages[{place}].content"
        parts = tuple(_parts(message, where, drafted, images))
        _judge_turn(message, parts, where, has_prompt=has_prompt)
        role: Role = "system" if message.role == "developer" else message.role
        messages.append(Message(role, parts))
    if messages[-1].role != "user":
        raise BadRequestError(
            f"messages: the last turn is {messages[-1].role!r}, expected 'user'", param="messages"
        )
    drafted.messages = tuple(messages)
    return drafted


def _judge_size(messages: Iterable[ChatMessage], limits: Limits) -> None:
    parts = [part for message in messages for part in message.content]
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    characters = sum(map(len, texts))
    if characters > limits.max_characters:
        raise TooLargeError(
            f"messages: {characters:,} characters of text, expected at most "
            f"{limits.max_characters:,}",
            param="messages",
        )
    if len(parts) - len(texts) > limits.max_images:
        raise BadRequestError(
            f"messages: {len(parts) - len(texts)} images, expected at most {limits.max_images}",
            param="messages",
            code="too_many_images",
        )


def _judge_turn(
    message: ChatMessage, parts: tuple[Part, ...], where: str, *, has_prompt: bool
) -> None:
    pictured = any(isinstance(part, Image) for part in parts)
    said = any(isinstance(part, Text) and part.text.strip() for part in parts)
    if pictured and message.role != "user":
        raise BadRequestError(f"{where}: only a user's turn shows images", param=where)
    if not said and not pictured and message.role != "assistant":
        raise BadRequestError(f"{where}: the turn is empty", param=where)
    if pictured and not said and not has_prompt:
        raise BadRequestError(
            f"{where}: images without a text, and this model was not trained with a prompt of its "
            "own; say what to do with them",
            param=where,
        )


def _parts(message: ChatMessage, where: str, drafted: Draft, images: Images) -> Iterable[Part]:
    """Parts of a turn; neighbouring texts become one, which the model sees as the same."""
    text = ""
    for place, part in enumerate(message.content):
        if isinstance(part, TextPart):
            text += part.text
            continue
        if text:
            yield Text(text)
            text = ""
        url, param = part.image_url.url, f"{where}[{place}].image_url.url"
        index = len(drafted.images)
        drafted.images.append(images.held(url, param))
        if drafted.images[index] is None:
            drafted.addresses.append((index, url, param))
        yield Image(index)
    if text or not message.content:
        yield Text(text)


def _refused(error: FetchError, param: str) -> BadRequestError | TooLargeError:
    kind = TooLargeError if error.code == "url_too_large" else BadRequestError
    return kind(f"{param}: {error}", param=param, code=error.code)
