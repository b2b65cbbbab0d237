"""The HTTP API: OpenAI's chat completions, health, metrics, and a page that describes them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import vlmtune
from vlmtune.data.conversation import Conversation
from vlmtune.errors import VlmtuneError
from vlmtune.fetch.network import INTERNET, Network
from vlmtune.serving.answers import Frame, server_sent
from vlmtune.serving.conversations import Draft, Images, draft
from vlmtune.serving.errors import ServingError
from vlmtune.serving.events import Began, Delta, Ended, Event, Failed
from vlmtune.serving.front import Front
from vlmtune.serving.http import (
    GONE,
    Bodies,
    Guard,
    client_left,
    error_object,
    error_response,
    refusal,
    refused,
)
from vlmtune.serving.limits import Limits
from vlmtune.serving.metrics import CONTENT_TYPE
from vlmtune.serving.page import page
from vlmtune.serving.schemas import ChatRequest, read_request

READERS, FETCHERS = 2, 16  # threads
SMALL = 256 * 1024  # bytes of a request that takes no longer than handing it to a thread


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """What the API allows.

    Attributes:
        api_keys: Any one of them opens it; none: everybody may ask.
        domains: Hosts whose images are fetched; see ``Images``.
        cors_origins: Web pages' origins that may ask; none by default.
        local_only: Answer only requests that name this machine as their host.
        limits: How much one request may bring.
        network: What fetching uses; another one is for tests only.
    """

    api_keys: Sequence[str] = ()
    domains: frozenset[str] = frozenset()
    cors_origins: Sequence[str] = ()
    local_only: bool = False
    limits: Limits = field(default_factory=Limits)
    network: Network = INTERNET


def create_app(engine: Front, config: ApiConfig | None = None) -> FastAPI:
    """The ASGI application.

    Args:
        engine: A started engine; who started it stops it.
        config: What is allowed.
    """
    config = config or ApiConfig()
    app = FastAPI(
        title="vlmtune",
        version=vlmtune.__version__,
        summary="OpenAI-compatible chat completions of a vision-language model",
        docs_url=None,  # the stock page loads its script from elsewhere
        redoc_url=None,
    )
    _answer_errors(app)
    _describe(app, engine)
    chat = Chat(engine, config)
    created = int(time.time())

    @app.get("/v1/models", summary="The names that can be asked")
    async def models() -> JSONResponse:
        data = [_model(name, created) for name in engine.served.models]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}", summary="One of them")
    async def model(name: str) -> JSONResponse:
        return JSONResponse(_model(engine.served.named(name).name, created))

    body = {"required": True, "content": {"application/json": {"schema": _request_schema()}}}

    @app.post(
        "/v1/chat/completions",
        summary="An answer, or a stream of its pieces",
        openapi_extra={"requestBody": body},
    )
    async def completions(request: Request) -> Response:
        return await chat(request)

    # Outermost last: a browser's preflight carries no key.
    app.add_middleware(
        Guard, keys=config.api_keys, local_only=config.local_only, metrics=engine.metrics
    )
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "vlmtune"}


def _request_schema() -> dict[str, Any]:
    """The request's schema without references, so that it stands alone."""
    schema = ChatRequest.model_json_schema()
    return dict(_inlined(schema, schema.pop("$defs", {})))


def _inlined(value: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_inlined(each, definitions) for each in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _inlined(definitions[value["$ref"].rsplit("/", 1)[1]], definitions)
    kept = {key: each for key, each in value.items() if key != "discriminator"}
    return {key: _inlined(each, definitions) for key, each in kept.items()}


def _describe(app: FastAPI, engine: Front) -> None:
    """Health, metrics and the page."""

    @app.get("/health", summary="Whether it answers")
    async def health() -> JSONResponse:
        fault = engine.fault
        value = {"status": "ok" if fault is None else "failed", "waiting": engine.waiting}
        value |= {"running": engine.running, **({"reason": fault} if fault else {})}
        return JSONResponse(value, 200 if fault is None else 503)

    @app.get("/metrics", summary="Figures for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi(), engine.served.first.name))


def _answer_errors(app: FastAPI) -> None:
    """Errors in OpenAI's shape, whoever finds them."""

    @app.exception_handler(ServingError)
    async def known(_: Request, error: Exception) -> Response:
        assert isinstance(error, ServingError)
        return refused(error)

    @app.exception_handler(HTTPException)
    async def unrouted(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        messages = {404: "there is nothing here; see /docs", 405: "this method is not allowed here"}
        message = messages.get(error.status_code, "the request cannot be answered")
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "failed")
        return error_response(
            error.status_code, message, code=code, headers=dict(error.headers or {})
        )

    @app.exception_handler(Exception)
    async def unknown(_: Request, __: Exception) -> Response:  # its log line is the server's own
        return error_response(
            500, "the server failed on this request; its log says why", code="failed"
        )


class Chat:
    """The one thing that takes time."""

    def __init__(self, engine: Front, config: ApiConfig) -> None:
        self._engine, self._limits = engine, config.limits
        self._images = Images(config.limits, config.domains, config.network)
        self._bodies = Bodies(config.limits)
        self._readers = ThreadPoolExecutor(READERS, "vlmtune reader")
        self._fetchers = ThreadPoolExecutor(FETCHERS, "vlmtune fetcher")

    async def __call__(self, request: Request) -> Response:
        """Answer one request.

        Raises:
            ServingError: With the status that says why not.
        """
        try:
            body = await self._bodies.read(request)
        except ClientDisconnect:
            return Response(status_code=GONE)
        held = len(body)  # until the model has read the question: its images wait with it
        try:
            asked, question = await self._read(request, body)
            listening = Listening(self._engine, asked, question, lambda: self._bodies.let_go(held))
        except BaseException:
            self._bodies.let_go(held)
            raise
        if asked.stream:
            return await _streamed(listening, asked, self._engine.config.request_seconds)
        return await _whole(listening, request)

    async def _read(self, request: Request, body: bytearray) -> tuple[ChatRequest, Conversation]:
        loop = asyncio.get_running_loop()
        if len(body) < SMALL:
            asked, drafted = self._understand(body)
        else:
            asked, drafted = await loop.run_in_executor(self._readers, self._understand, body)
        fetches = [
            loop.run_in_executor(self._fetchers, self._images.fetch, url, param)
            for _, url, param in drafted.addresses
        ]
        found = await asyncio.gather(*fetches)
        for (place, _, _), data in zip(drafted.addresses, found, strict=True):
            drafted.images[place] = data
        return asked, drafted.finished(request.state.request_id)

    def _understand(self, body: bytearray) -> tuple[ChatRequest, Draft]:
        asked = read_request(body, self._limits)
        contract = self._engine.served.named(asked.model).encoder.contract
        prompted = contract.prompt is not None or contract.instruction is not None
        return asked, draft(asked, self._images, has_prompt=prompted)


class Listening:
    """A question to the engine, and its events on the server's own thread.

    Args:
        engine: What answers.
        asked: The request.
        question: The conversation in it.
        was_read: Called once, when the question itself is not needed any more.

    Raises:
        ServingError: If the engine does not take the question.
    """

    def __init__(
        self,
        engine: Front,
        asked: ChatRequest,
        question: Conversation,
        was_read: Callable[[], None],
    ) -> None:
        self._was_read: Callable[[], None] | None = was_read
        self.settings = asked.settings()
        self.frame = Frame(f"chatcmpl-{secrets.token_hex(12)}", asked.model)
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._asking = engine.submit(question, self.settings, self._hear, model=asked.model)

    def _hear(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended, its loop is closed
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def leave(self) -> None:
        """Nobody listens any more: the answer ends within a step."""
        self._asking.cancel()
        self._events.put_nowait(None)
        self._let_go()

    def _let_go(self) -> None:
        if self._was_read is not None:
            self._was_read()
            self._was_read = None

    async def begin(self) -> Began:
        """Wait until the question was read.

        Raises:
            ServingError: Why there will be no answer.
        """
        async for event in self:
            assert isinstance(event, Began)
            return event
        raise ClientDisconnect

    async def __aiter__(self) -> AsyncIterator[Began | Delta | Ended]:
        """Events to the last, or until ``leave``."""
        while (event := await self._events.get()) is not None:
            self._let_go()
            if isinstance(event, Failed):
                raise refusal(event.error)
            yield event


async def _whole(listening: Listening, request: Request) -> Response:
    gone = asyncio.ensure_future(client_left(request))
    gone.add_done_callback(lambda _: listening.leave())
    prompt_tokens, ended = 0, []
    try:
        async for event in listening:
            if isinstance(event, Began):
                prompt_tokens = event.prompt_tokens
            elif isinstance(event, Ended):
                ended.append(event)
                if len(ended) == listening.settings.n:
                    return JSONResponse(listening.frame.whole(ended, prompt_tokens))
        return Response(status_code=GONE)
    finally:
        gone.cancel()  # which calls ``leave``, too


async def _streamed(listening: Listening, asked: ChatRequest, seconds: float) -> Response:
    try:
        began = await listening.begin()  # what fails before has a status of its own
    except BaseException:
        listening.leave()
        raise

    async def events() -> AsyncIterator[bytes]:
        ended: list[Ended] = []
        try:
            for chunk in listening.frame.opening(listening.settings.n):
                yield server_sent(chunk)
            async for event in listening:
                if isinstance(event, Delta):
                    yield server_sent(listening.frame.piece(event))
                    # Else a client's leaving would be noticed only when nothing is left to send.
                    await asyncio.sleep(0)
                elif isinstance(event, Ended):
                    ended.append(event)
                    yield server_sent(listening.frame.closing(event))
                    if len(ended) == listening.settings.n:
                        break
            if asked.tells_usage:
                yield server_sent(listening.frame.count(ended, began.prompt_tokens))
        except VlmtuneError as error:
            yield server_sent(error_object(refusal(error)))
        finally:
            listening.leave()
        yield b"data: [DONE]\n\n"

    return Patient(events(), media_type="text/event-stream", seconds=2 * seconds)


class Patient(StreamingResponse):
    """A stream that a client may read slowly, but not for ever."""

    def __init__(self, *arguments: Any, seconds: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._seconds = seconds

    async def __call__(self, *arguments: Any) -> None:
        """Send everything, or as much as time allows."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                await super().__call__(*arguments)
