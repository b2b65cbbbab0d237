"""How one question is answered, and how many are answered at once."""

from __future__ import annotations

from pydantic import Field, field_validator

from vlmtune.config import Config

MAX_NEW_TOKENS = 1024  # of requests that do not say
MAX_STOPS = 16


class Settings(Config):
    """How a question is answered. Greedy unless a temperature is asked for, as in evaluation.

    Attributes:
        max_tokens: Longest answer; None takes the engine's default, or what the context leaves.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn.
        top_p: Draw only from the likeliest tokens that together have this probability.
        seed: Same seed, same answer, whoever else is asking; None draws one.
        stop: Texts that end the answer; they are not part of it.
        n: Number of answers, each drawn with a seed of its own.
        logprobs: Whether the log-probability of each token is told.
        top_logprobs: Number of likeliest tokens told beside each token.
        stream: Whether the answer is told piece by piece.
    """

    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: tuple[str, ...] = Field(default=(), max_length=MAX_STOPS)
    n: int = Field(default=1, ge=1, le=128)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    stream: bool = False

    @field_validator("stop")
    @classmethod
    def _says_something(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError("an empty text would end every answer before it begins")
        return value


class EngineConfig(Config):
    """How many questions are answered at once, and how long one may take.

    Attributes:
        batch_rows: Most answers that are spoken at once.
        cache_tokens: Tokens that the caches of all running answers may hold, padding included.
            Where they are full, younger answers wait for older ones; one alone may be longer.
        prefill_tokens: Most tokens of new questions read in one forward; running answers wait.
        max_waiting: Most questions that wait for their turn; further ones are refused.
        max_new_tokens: Longest answer of requests that do not say.
        request_seconds: Longest time from asking to the end of the answer.
        encoders: Threads that decode images and make tokens.
    """

    batch_rows: int = Field(default=32, ge=1)
    cache_tokens: int = Field(default=65_536, ge=1)
    prefill_tokens: int = Field(default=4096, ge=1)
    max_waiting: int = Field(default=256, ge=1)
    max_new_tokens: int = Field(default=MAX_NEW_TOKENS, ge=1)
    request_seconds: float = Field(default=600.0, gt=0)
    encoders: int = Field(default=2, ge=1)
