"""The verbs as functions: what ``import vlmtune`` gives, and all that the command line calls."""

from __future__ import annotations

from vlmtune.data.prepare import PrepareOptions, PrepareResult, prepare
from vlmtune.hub import Downloaded, download_model
from vlmtune.verbs.check import check
from vlmtune.verbs.evaluate import evaluate
from vlmtune.verbs.merge import merge
from vlmtune.verbs.predict import predict
from vlmtune.verbs.quickstart import quickstart
from vlmtune.verbs.report import report
from vlmtune.verbs.train import train

__all__ = [
    "Downloaded",
    "PrepareOptions",
    "PrepareResult",
    "check",
    "download_model",
    "evaluate",
    "merge",
    "predict",
    "prepare",
    "quickstart",
    "report",
    "train",
]
