"""The page's controls as settings. Pure."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from vlmtune.serving.settings import Settings


def settings_of(temperature: Any, top_p: Any, max_tokens: Any, seed: Any) -> Settings:
    """Settings from the page's controls; one that is empty or out of range counts as not set."""
    values = {
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "seed": str(seed or "").strip() or None,
        "stream": True,
    }
    try:
        return Settings.model_validate({k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        wrong = {fault["loc"][0] for fault in error.errors()}
        kept = {k: v for k, v in values.items() if k not in wrong and v is not None}
        return Settings.model_validate(kept)
