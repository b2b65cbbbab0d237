"""From image-text pairs to a fine-tuned vision-language model you can trust."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = [
    "chat",
    "check",
    "doctor",
    "download",
    "evaluate",
    "export",
    "inspect",
    "list_runs",
    "merge",
    "plan",
    "predict",
    "prepare",
    "report",
    "reproduce",
    "serve",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load a verb when it is first used: ``import vlmtune`` alone loads nothing heavy."""
    if name not in __all__:
        raise AttributeError(f"module 'vlmtune' has no attribute {name!r}")
    from vlmtune import api

    return api.verb(name)


def __dir__() -> list[str]:
    """The verbs, for completion."""
    return [*__all__, "__version__"]
