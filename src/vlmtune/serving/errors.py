"""What the engine refuses, and why: each with the HTTP status that says so."""

from __future__ import annotations

import logging

import torch

from vlmtune.errors import VlmtuneError

logger = logging.getLogger(__name__)


class ServingError(VlmtuneError):
    """A question that was not answered.

    Args:
        message: What, found, expected, next step; told to whoever asked. No path, no secret.
        param: The parameter of the request that is to blame, e.g. ``max_tokens``.
        code: Stable, machine-readable name of the fault.
    """

    status = 500
    kind = "server_error"
    code = "failed"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or self.code


class BadRequestError(ServingError):
    """The request asks for what cannot be."""

    status = 400
    kind = "invalid_request_error"
    code = "invalid_request"


class UnknownModelError(ServingError):
    """No model of that name is served."""

    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class TooLargeError(ServingError):
    """A body, an image or a text beyond the server's limits."""

    status = 413
    kind = "invalid_request_error"
    code = "request_too_large"


class BusyError(ServingError):
    """The queue is full.

    Attributes:
        retry_after: Whole seconds after which asking again makes sense.
    """

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OverloadedError(ServingError):
    """The device ran out of memory, or the server is going down; the question may come again."""

    status = 503
    kind = "server_error"
    code = "overloaded"


class TooSlowError(ServingError):
    """The answer was not finished within ``request_seconds``."""

    status = 504
    kind = "server_error"
    code = "timeout"


def internal(error: BaseException) -> ServingError:
    """A defect or a full device, in words that tell nothing about this machine; logged in full."""
    if isinstance(error, torch.OutOfMemoryError):
        logger.error("out of memory on the device; the question was given up")
        return OverloadedError("the device has no memory left for this question; try again later")
    logger.error("a question failed", exc_info=error)
    return ServingError("the server failed on this request; its log says why")
