"""The verbs as functions: what ``import vlmtune`` gives, and all that the command line calls."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmtune.garbage import without_collecting

if TYPE_CHECKING:
    from vlmtune.data.prepare import PrepareOptions, PrepareResult, prepare
    from vlmtune.verbs.chat import chat
    from vlmtune.verbs.check import check
    from vlmtune.verbs.doctor import doctor
    from vlmtune.verbs.download import download
    from vlmtune.verbs.evaluate import evaluate
    from vlmtune.verbs.export import export
    from vlmtune.verbs.inspect import inspect
    from vlmtune.verbs.merge import merge
    from vlmtune.verbs.plan import plan
    from vlmtune.verbs.predict import predict
    from vlmtune.verbs.report import report
    from vlmtune.verbs.reproduce import reproduce
    from vlmtune.verbs.runs import list_runs
    from vlmtune.verbs.serve import serve
    from vlmtune.verbs.train import train

__all__ = [
    "PrepareOptions",
    "PrepareResult",
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

_HOMES = {name: f"vlmtune.verbs.{name}" for name in __all__} | {
    "PrepareOptions": "vlmtune.data.prepare",
    "PrepareResult": "vlmtune.data.prepare",
    "list_runs": "vlmtune.verbs.runs",
    "prepare": "vlmtune.data.prepare",
}


def verb(name: str) -> Any:
    """A verb, or what it takes or returns, by its name: one that trains loads no server."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmtune.api' has no attribute {name!r}")
    with without_collecting():
        return vars(import_module(_HOMES[name]))[name]


__getattr__ = verb
