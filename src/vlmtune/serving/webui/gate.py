"""What stands before the page: which host, which password, how large a request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import html
import re
import secrets
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from vlmtune.serving.http import HERE
from vlmtune.serving.webui.events import (
    MAX_EVENT_BYTES,
    BadEventError,
    check_event,
    read_body,
    replayed,
)
from vlmtune.serving.webui.words import preferred

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "vlmtune-ui"
ENTER = "/enter"  # Gradio has a /login of its own
MAX_FORM_BYTES = 4096
WRONG_SECONDS = 1.0  # a wrong password costs so much, and one is judged at a time
# What the page itself needs. Gradio has more: proxies, saved sessions, an editor, a record of runs.
OPEN = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?"
    r"|/(assets|static|svelte)/.*"
    r"|/gradio_api/(theme\.css|queue/join|queue/data|upload|upload_progress|cancel|reset"
    r"|app_id|startup-events|heartbeat/\w+|file=.*)/?"
)
UPLOAD = re.compile(r"/gradio_api/upload/?")
HEADERS = {
    # Gradio's own scripts stand in the page and make functions from text.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' "
    "'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'; "
    "base-uri 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with "no-referrer" a form's own origin is sent as null
}
PAGE = """<!doctype html><html lang="{language}"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>vlmtune</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px system-ui, sans-serif; display: grid; place-items: center; min-height: 90vh }}
form {{ display: grid; gap: .8rem; width: min(20rem, 90vw) }}
input, button {{ font: inherit; padding: .6rem .8rem; border-radius: .5rem }}
input {{ border: 1px solid #8888 }}
button {{ background: #4f46e5; color: #fff; border: 0; cursor: pointer }}
p {{ margin: 0; color: #b45309 }}</style>
<form method="post" action="{action}"><h1>vlmtune</h1><label for="password">{label}</label>
<input id="password" name="password" type="password" autocomplete="current-password" autofocus>
<p role="alert">{fault}</p><button>{enter}</button></form></html>"""
LABELS = {
    "en": ("Password", "Enter", "That is not the password."),
    "zh": ("密码", "进入", "密码不正确。"),
}


class Gate:
    """Lets in who may come.

    Args:
        app: The page.
        password: What visitors have to know; None asks for nothing.
        local_only: Whether to answer only requests that name this machine as their host, so that
            no web page can reach the server by a name that it lets point here (DNS rebinding).
        folder: Where uploads and pictures lie: no event may name another file.
        max_body_bytes: Largest request: an upload of several pictures.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        password: str | None,
        local_only: bool,
        folder: Path,
        max_body_bytes: int,
    ) -> None:
        self._app, self._folder = app, folder
        self._password = None if password is None else _digest(password)
        self._local_only, self._max_body_bytes = local_only, max_body_bytes
        self._token = secrets.token_urlsafe(32)
        self._one_at_a_time = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        request = Request(scope, receive)
        refused = self._refusal(request) or await self._asked_for_password(request)
        receive = self._counted(receive)
        if refused is None and request.method == "POST" and not UPLOAD.fullmatch(request.url.path):
            try:
                body = await read_body(receive, MAX_EVENT_BYTES)
                check_event(body, self._folder)
                receive = replayed(body, receive)
            except BadEventError as error:
                refused = PlainTextResponse(f"The event cannot be taken: {error}.", 400)
        await (refused or self._app)(scope, receive, answer)

    def _refusal(self, request: Request) -> Response | None:
        headers = request.headers
        if self._local_only and not HERE.fullmatch(headers.get("host", "")):
            return PlainTextResponse("This page is for localhost only.", 403)
        if not _same_origin(headers):
            return PlainTextResponse("Another page may not ask in this one's name.", 403)
        if not headers.get("content-length", "0").isdecimal():
            return PlainTextResponse("The length is no number.", 400)
        if int(headers.get("content-length", "0")) > self._max_body_bytes:
            return PlainTextResponse("The request is too large.", 413)
        if request.url.path != ENTER and not OPEN.fullmatch(request.url.path):
            return PlainTextResponse("There is nothing here.", 404)
        return None

    async def _asked_for_password(self, request: Request) -> Response | None:
        """The page that asks for it, where it is needed and not known yet."""
        path, method = request.url.path, request.method
        if self._password is None or self._knows(request.headers):
            return RedirectResponse("./", 303) if path == ENTER else None
        if path == ENTER and method == "POST":
            return await self._enter(request)
        if path in ("/", ENTER) and method == "GET":
            return _page(request.headers, wrong=False)
        return PlainTextResponse("A password is needed.", 401)

    async def _enter(self, request: Request) -> Response:
        if int(request.headers.get("content-length", "0")) > MAX_FORM_BYTES:
            return PlainTextResponse("The request is too large.", 413)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_FORM_BYTES:
                return PlainTextResponse("The request is too large.", 413)
        given = parse_qs(body.decode("utf-8", "replace")).get("password", [""])[0]
        async with self._one_at_a_time:
            assert self._password is not None
            if not hmac.compare_digest(_digest(given), self._password):
                await asyncio.sleep(WRONG_SECONDS)
                return _page(request.headers, wrong=True)
        response = RedirectResponse("./", 303)
        response.set_cookie(COOKIE, self._token, httponly=True, samesite="strict")
        return response

    def _knows(self, headers: Headers) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(
            cookie.value.encode(), self._token.encode()
        )

    def _counted(self, receive: Receive) -> Receive:
        """A body that ends with the connection when it grows beyond what is allowed."""
        left = self._max_body_bytes

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        return counted


def _same_origin(headers: Headers) -> bool:
    """Whether a request comes from this page, or from no page."""
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host", "")


def _page(headers: Headers, *, wrong: bool) -> HTMLResponse:
    language = preferred(headers.get("accept-language", ""))
    label, enter, fault = LABELS[language]
    return HTMLResponse(
        PAGE.format(
            language=language,
            action=html.escape(ENTER.removeprefix("/")),
            label=label,
            enter=enter,
            fault=fault if wrong else "",
        ),
        401 if wrong else 200,
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
