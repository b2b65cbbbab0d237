"""The engine's events as OpenAI's objects.

Beside what OpenAI has, every message (in a stream, the last delta of each choice) has ``vlmtune``:
``{"boxes": [{"label", "xyxy", "image"}]}``, in pixels of the upright image that was sent; ``image``
counts the request's images from 0, in reading order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.serving.events import Delta, Ended, TokenLogprob

REPLACED = "\N{REPLACEMENT CHARACTER}"
LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}  # JSON leaves them


@dataclass(frozen=True)
class Frame:
    """What all objects of one response share.

    Attributes:
        id: The response's id.
        model: The model's name.
        created: Seconds since 1970.
    """

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, ended: Sequence[Ended], prompt_tokens: int) -> dict[str, Any]:
        """A ``chat.completion``."""
        choices = [
            {
                "index": answer.choice,
                "message": {
                    "role": "assistant",
                    "content": answer.text,
                    "refusal": None,
                    "vlmtune": extension(answer),
                },
                "logprobs": logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
            }
            for answer in sorted(ended, key=lambda answer: answer.choice)
        ]
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": usage(ended, prompt_tokens),
        }

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """The first chunks of a stream: who speaks."""
        return [
            self._chunk(choice, {"role": "assistant", "content": "", "refusal": None})
            for choice in range(choices)
        ]

    def piece(self, delta: Delta) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk(delta.choice, {"content": delta.text}, logprobs(delta.logprobs))

    def closing(self, ended: Ended) -> dict[str, Any]:
        """The chunk that ends a choice."""
        delta = {"vlmtune": extension(ended)}
        return self._chunk(ended.choice, delta, finish_reason=ended.finish_reason)

    def count(self, ended: Sequence[Ended], prompt_tokens: int) -> dict[str, Any]:
        """The chunk that counts the tokens."""
        head = self._head("chat.completion.chunk")
        return {**head, "choices": [], "usage": usage(ended, prompt_tokens)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        told: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        one = {"index": choice, "delta": delta, "logprobs": told, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [one]}


def server_sent(value: dict[str, Any]) -> bytes:
    """One server-sent event. Nothing in it ends a line, of whatever kind a client may know."""
    text = json.dumps(value, ensure_ascii=False).translate(LINE_ENDS)
    return b"data: " + text.encode() + b"\n\n"


def usage(ended: Sequence[Ended], prompt_tokens: int) -> dict[str, Any]:
    """The count of tokens; the question counts once, however many answers it has."""
    said = sum(answer.completion_tokens for answer in ended)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": said,
        "total_tokens": prompt_tokens + said,
    }


def extension(ended: Ended) -> dict[str, Any]:
    """What OpenAI's message has no place for."""
    return {
        "boxes": [
            {"label": box.label, "xyxy": list(box.xyxy), "image": box.image} for box in ended.boxes
        ]
    }


def logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """Tokens with their log-probabilities; None where none are told."""
    if not tokens:
        return None
    content = [
        {**_token(token), "top_logprobs": [_token(other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> dict[str, Any]:
    # A token may hold half of a character; then its bytes are not known from its text.
    whole = REPLACED not in token.text
    return {
        "token": token.text,
        "logprob": max(token.logprob, -9999.0),
        "bytes": list(token.text.encode()) if whole else None,
    }
