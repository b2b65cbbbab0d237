"""What an engine tells whoever asked: ``Began``, ``Delta`` …, and ``Ended`` for each answer.

``Failed`` may come at any time, and is then the last.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlmtune.data.conversation import Box
from vlmtune.errors import VlmtuneError


@dataclass(frozen=True)
class TokenLogprob:
    """A token and how likely the model held it.

    Attributes:
        id: The token's id.
        text: Its text by itself, control tokens included.
        logprob: Natural logarithm of its probability.
        top: The likeliest tokens in its place, best first.
    """

    id: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Began:
    """The question was read; the answers begin.

    Attributes:
        prompt_tokens: Its tokens, image tokens included.
    """

    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer, where ``Settings.stream``.

    Attributes:
        choice: Which of the ``n`` answers.
        text: What comes after the pieces before.
        logprobs: Its tokens, where they were asked for.
    """

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Ended:
    """An answer, whole.

    Attributes:
        choice: Which of the ``n`` answers.
        text: All of it, without control tokens and without the text that stopped it.
        boxes: Boxes in it, in pixels of the upright images; ``Box.image`` counts the question's
            images from 0 in reading order.
        finish_reason: ``stop``: the model or a stop text ended it; ``length``: the limit did.
        completion_tokens: Tokens that were said, end token and stop text included.
        logprobs: All its tokens, where they were asked for.
    """

    choice: int
    text: str
    boxes: tuple[Box, ...]
    finish_reason: str
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no rest of it."""

    error: VlmtuneError


Event = Began | Delta | Ended | Failed
