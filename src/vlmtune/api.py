"""The verbs as functions: what ``import vlmtune`` gives, and all that the command line calls."""

from __future__ import annotations

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
