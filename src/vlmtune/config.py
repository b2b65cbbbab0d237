"""The base of every configuration class: immutable, keyword-only, and unknown keys are errors."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A part's own options. Parts are composed into a ``Recipe``; see ``recipe.py``."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )
