"""What stands before the API's own work: who may ask, and how much a body may hold."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse

from vlmtune.errors import DataError, ModelError, VlmtuneError
from vlmtune.serving.errors import BadRequestError, BusyError, ServingError, TooLargeError, internal
from vlmtune.serving.limits import Limits
from vlmtune.serving.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("vlmtune.serving")

OPEN = ("/health",)  # asked by load balancers, which have no key
HERE = re.compile(r"(localhost|[\w-]+\.localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?", re.IGNORECASE)
HEADERS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'",
}
GONE = 499  # as nginx counts clients that left


class Guard:
    """Keys, hosts, headers and the log line of every request.

    Args:
        app: What answers.
        keys: Any one of them opens everything; none: no key is asked for.
        local_only: Whether to answer only requests that name this machine as their host, so that
            no web page can reach the server by a name that it lets point here (DNS rebinding).
        metrics: Where requests are counted.
    """

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[str], local_only: bool, metrics: Metrics
    ) -> None:
        self._app, self._metrics = app, metrics
        self._keys = [_digest(key.encode()) for key in keys]
        self._local_only = local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it before its body is read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), GONE
        name = f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = name

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                for header, value in HEADERS.items():
                    headers.setdefault(header, value)
            await send(message)

        try:
            refused = self._refusal(Headers(scope=scope), scope["path"])
            await (refused or self._app)(scope, receive, answer)
        finally:
            self._metrics.add("http_requests", status=status)
            logger.info(
                "%s %s %s %d %.3f s",
                name,
                scope["method"],
                ascii(scope["path"])[1:-1][:80],
                status,
                time.monotonic() - started,
            )

    def _refusal(self, headers: Headers, path: str) -> JSONResponse | None:
        if self._local_only and not HERE.fullmatch(headers.get("host", "")):
            return error_response(
                403,
                "this server answers only requests to localhost; start it with --api-key-file to "
                "be asked under another name",
                code="host_not_allowed",
            )
        if self._keys and path not in OPEN:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = _digest(key.strip().encode("utf-8", "surrogateescape"))
            # All are compared, and digests of one length: nothing is told by how long it takes.
            fits = [hmac.compare_digest(given, known) for known in self._keys]
            if scheme.lower() != "bearer" or not any(fits):
                return error_response(
                    401,
                    "the API key is missing or wrong; send Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Bodies:
    """Reads the bodies of requests, within bounds for each and for all together."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held = limits, 0

    async def read(self, request: Request) -> bytearray:
        """A JSON body. What it holds is counted until ``let_go``.

        Raises:
            TooLargeError: If it is larger than one may be.
            BusyError: If all together are.
            UnsupportedError: If it is no plain JSON.
            SlowError: If it does not come in time.
            ClientDisconnect: If the client leaves.
        """
        self._judge(request.headers)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for piece in request.stream():
                    body += piece
                    self._held += len(piece)
                    if len(body) > self._limits.max_body_bytes:
                        raise self._too_large()
                    if self._held > self._limits.max_pending_bytes:
                        raise BusyError(
                            "too many large requests at once; try again later", retry_after=2
                        )
        except TimeoutError:
            self.let_go(len(body))
            raise SlowError(
                f"the body did not come within {self._limits.body_seconds:g} s"
            ) from None
        except BaseException:
            self.let_go(len(body))
            raise
        return body

    def let_go(self, count: int) -> None:
        """So many bytes are not held any more."""
        self._held -= count

    def _judge(self, headers: Headers) -> None:
        # A web page may send anything but JSON to this machine without asking (no preflight).
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise UnsupportedError(f"the content type is {kind[:80]!r}, expected application/json")
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            raise UnsupportedError("compressed bodies are not taken; send plain JSON")
        length = headers.get("content-length", "")
        if re.fullmatch(r"[0-9]{1,18}", length) and int(length) > self._limits.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> TooLargeError:
        return TooLargeError(
            f"the request is larger than {self._limits.max_body_bytes:,} bytes; send fewer or "
            "smaller images"
        )


class SlowError(ServingError):
    """A body that does not come in time."""

    status = 408
    kind = "invalid_request_error"
    code = "timeout"


class UnsupportedError(ServingError):
    """A body in another form."""

    status = 415
    kind = "invalid_request_error"
    code = "unsupported_media_type"


def refusal(error: VlmtuneError) -> ServingError:
    """An error as the API tells it."""
    if isinstance(error, ServingError):
        return error
    if isinstance(error, DataError | ModelError):  # of encoding: an image, the order of the turns
        return BadRequestError(str(error), param="messages", code=error.code)
    return internal(error)


def refused(error: ServingError) -> JSONResponse:
    """The response that says why there is no answer."""
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, BusyError) else None
    if error.status == 503:
        headers = {"retry-after": "5"}
    return JSONResponse(error_object(error), error.status, headers)


def error_object(error: ServingError) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {
        "error": {
            "message": str(error),
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(
    status: int, message: str, *, code: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """A refusal that no exception stands for."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)


async def client_left(request: Request) -> None:
    """Wait until the client has left; its body was read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
