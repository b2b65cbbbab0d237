"""The request of ``POST /v1/chat/completions``, as OpenAI's clients send it."""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vlmtune.serving.errors import BadRequestError
from vlmtune.serving.limits import Limits
from vlmtune.serving.settings import MAX_STOPS, Settings

# Parameters that would change the answer in ways this server cannot: only their neutral values.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "top_k": (0, -1),
    "min_p": (0,),
}
# Parameters that say nothing about the answer.
IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
DEEPEST = 32
MESSAGE_TOOLS = ("tool_calls", "function_call", "audio")


class Form(BaseModel):
    """A part of a request; numbers are numbers, not texts of them."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


class TextPart(Form):
    """A piece of text. Control tokens inside it are text."""

    type: Literal["text"]
    text: str


class ImageURL(Form):
    """Where an image is."""

    url: str = Field(
        description="`data:image/png;base64,…`, or an http(s) address of a domain that the server "
        "was told to open"
    )
    detail: str | None = Field(
        default=None, description="Ignored: the model's contract says how large it sees an image"
    )


class ImagePart(Form):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [] if content is None else content


class ChatMessage(Form):
    """One turn. Further fields, such as those of an answer that is sent back, are ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part] | None)
    ] = Field(
        default_factory=list,
        description="A text, or parts. A user's turn with images alone takes the prompt that the "
        "model was trained with",
    )


class StreamOptions(Form):
    """What a stream tells besides."""

    include_usage: bool | None = Field(
        default=None, description="End with a chunk that counts the tokens"
    )


class ChatRequest(Form):
    """A question."""

    model: str = Field(description="A name of `/v1/models`")
    messages: list[ChatMessage] = Field(min_length=1, description="The turns; the last is a user's")
    max_tokens: int | None = Field(
        default=None, ge=1, description="Longest answer; the old name of max_completion_tokens"
    )
    max_completion_tokens: int | None = Field(default=None, ge=1, description="Longest answer")
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="0, the default here: the likeliest token"
    )
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling")
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**63, description="Same seed, same answer"
    )
    stop: str | list[str] | None = Field(
        default=None, max_length=MAX_STOPS, description="Texts that end the answer"
    )
    n: int | None = Field(default=None, ge=1, le=128, description="Number of answers")
    logprobs: bool | None = Field(default=None, description="Tell each token's log-probability")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Likeliest tokens told beside each; needs logprobs"
    )
    stream: bool | None = Field(default=None, description="Server-sent events")
    stream_options: StreamOptions | None = None

    def settings(self) -> Settings:
        """How the engine is to answer.

        Raises:
            BadRequestError: If parameters contradict each other.
        """
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise BadRequestError(
                "max_tokens and max_completion_tokens say different things; give one of them",
                param="max_completion_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise BadRequestError("stream_options needs stream: true", param="stream_options")
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(stops):
            raise BadRequestError("stop: an empty text would end every answer", param="stop")
        return Settings(
            max_tokens=next(iter(limits), None),
            temperature=0.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=stops,
            n=self.n or 1,
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
            stream=bool(self.stream),
        )

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def read_request(body: bytes | bytearray, limits: Limits) -> ChatRequest:
    """A request from its bytes.

    Raises:
        BadRequestError: Naming the parameter that is to blame.
    """
    value = _json(body, limits)
    if not isinstance(value, dict):
        raise BadRequestError('the body is no JSON object; expected {"model": …, "messages": …}')
    _judge_parameters(value)
    messages = value.get("messages")
    if isinstance(messages, list):
        if len(messages) > limits.max_messages:
            raise BadRequestError(
                f"messages: found {len(messages)}, expected at most {limits.max_messages}",
                param="messages",
            )
        _judge_messages(messages)
    try:
        return ChatRequest.model_validate(value)
    except ValidationError as error:
        _refuse(error)


def _json(body: bytes | bytearray, limits: Limits) -> Any:
    delimiters = sum(body.count(sign) for sign in (b"[", b"{", b","))
    if delimiters > limits.max_delimiters:
        raise BadRequestError(
            f"the JSON has {delimiters:,} brackets and commas, expected at most "
            f"{limits.max_delimiters:,}"
        )
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise BadRequestError("the body is not UTF-8") from None
    except ValueError as error:  # its own words name a place, never the content
        raise BadRequestError(f"the body is no JSON: {str(error)[:200]}") from None
    _judge_depth(value)
    if b"\\ud" in body or b"\\uD" in body:
        _judge_characters(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _judge_characters(value: Any) -> None:
    """Refuse halves of surrogate pairs: JSON can escape them, UTF-8 cannot write them."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRequestError(
            "a text holds half of a surrogate pair, which is no character"
        ) from None


def _judge_depth(value: Any) -> None:
    """Refuse what is nested deeper than any request, without recursion."""
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        if not inner:
            return
        level = inner
    raise _too_deep()


def _too_deep() -> BadRequestError:
    return BadRequestError(f"the JSON is nested more than {DEEPEST} levels deep")


def _judge_parameters(value: dict[str, Any]) -> None:
    known = {*ChatRequest.model_fields, *UNSUPPORTED, *IGNORED}
    for name, given in value.items():
        if name not in known:
            near = difflib.get_close_matches(name[:40], known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BadRequestError(
                f"unknown parameter {name[:40]!r}{hint}", param=name[:40], code="unknown_parameter"
            )
        if name in UNSUPPORTED and given is not None and given not in UNSUPPORTED[name]:
            raise BadRequestError(
                f"{name} is not supported by this server; leave it out",
                param=name,
                code="unsupported_parameter",
            )


def _judge_messages(messages: list[Any]) -> None:
    for place, message in enumerate(messages):
        used = [name for name in MESSAGE_TOOLS if isinstance(message, dict) and message.get(name)]
        if used:
            raise BadRequestError(
                f"messages[{place}].{used[0]} is not supported by this server",
                param=f"messages[{place}].{used[0]}",
                code="unsupported_parameter",
            )


def _refuse(error: ValidationError) -> NoReturn:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = list(first["loc"])
    if path[2:3] == ["content"]:
        del path[4:5]  # the kind of the part, which is no key of the request
    param = _spelled(path)
    raise BadRequestError(f"{param}: {first['msg'][:300]}", param=param) from None


def _spelled(path: list[int | str]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text[:100]
