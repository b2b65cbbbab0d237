"""Who may come to the page, and what may be sent to it."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import urlencode

import pytest

from vlmtune.serving.webui import gate
from vlmtune.serving.webui.events import BadEventError, check_event
from vlmtune.serving.webui.gate import COOKIE, Gate

JOIN = "/gradio_api/queue/join"
UPLOAD = "/gradio_api/upload"


async def inside(_scope, receive, send):
    """An application that says what it was sent."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in:" + body})


def ask(door, path="/", method="GET", body=b"", *, pieces=None, **headers):
    """Status, headers and body of one request."""
    sent = []
    waiting = list(pieces or [body])

    async def receive():
        piece = waiting.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(waiting)}

    async def send(message):
        sent.append(message)

    headers = {"host": "localhost:7860", **headers}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(name.replace("_", "-").encode(), v.encode()) for name, v in headers.items()],
    }
    asyncio.run(door(scope, receive, send))
    if not sent:
        return None, {}, b""
    answer = dict(sent[0]["headers"])
    return sent[0]["status"], answer, b"".join(one.get("body", b"") for one in sent[1:])


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "WRONG_SECONDS", 0)

    def make(**options):
        options = {"password": None, "local_only": True, "max_body_bytes": 1000, **options}
        return Gate(inside, folder=tmp_path, **options)

    return make


def test_only_this_machine(make):
    assert ask(make())[0] == 200
    assert ask(make(), host="evil.example")[0] == 403
    assert ask(make(local_only=False), host="evil.example")[0] == 200


def test_no_other_page_asks_in_this_ones_name(make):
    assert ask(make(), JOIN, "POST", b"{}", origin="http://localhost:7860")[0] == 200
    assert ask(make(), JOIN, "POST", b"{}", origin="http://evil.example")[0] == 403
    assert ask(make(), JOIN, "POST", b"{}", origin="null")[0] == 403


def test_browsers_tell_the_gate_where_a_form_comes_from(make):
    """Under ``no-referrer`` Chromium sends ``Origin: null`` with the password, which is refused."""
    door = make(password="sesame", local_only=False)
    body = urlencode({"password": "sesame"}).encode()
    for headers in (ask(door)[1], ask(make())[1]):
        assert headers[b"referrer-policy"] == b"same-origin"
    form = {"path": gate.ENTER, "method": "POST", "body": body}
    assert ask(door, **form, origin="http://localhost:7860")[0] == 303
    assert ask(door, **form, origin="null")[0] == 403


def test_nothing_comes_from_elsewhere(make):
    policy = ask(make())[1][b"content-security-policy"].decode()
    assert "default-src 'self'" in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/info", "/gradio_api/proxy=http://x", "/gradio_api/vibe-edit", "/monitoring",
     "/gradio_api/deep_link", "/login", "/gradio_api/call/ask", "/gradio_api/run/ask"],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(make, path):
    assert ask(make(), path)[0] == 404


def test_a_password(make):
    door = make(password="sesame", local_only=False)
    status, _, page = ask(door)
    assert (status, b"password" in page, page.startswith(b"in:")) == (200, True, False)
    for path in ("/config", JOIN, UPLOAD, "/gradio_api/file=x"):
        assert ask(door, path)[0] == 401
    form = {"path": gate.ENTER, "method": "POST"}
    status, headers, page = ask(door, **form, body=urlencode({"password": "wrong"}).encode())
    assert (status, b"set-cookie" in headers) == (401, False)
    assert b"not the password" in page
    status, headers, _ = ask(door, **form, body=urlencode({"password": "sesame"}).encode())
    assert status == 303
    cookie = headers[b"set-cookie"].decode().split(";")[0]
    assert "httponly" in headers[b"set-cookie"].decode().lower()
    assert ask(door, cookie=cookie)[2] == b"in:"
    assert ask(door, "/config", cookie=cookie)[0] == 200
    # Not the cookie of another start, nor an empty or broken one.
    other = make(password="sesame", local_only=False)
    for wrong in (cookie, f"{COOKIE}=", "x=y", '"'):
        assert ask(other, "/config", cookie=wrong)[0] == 401
    assert ask(door, **form, body=b"x" * 5000)[0] == 413
    assert b'<html lang="zh"' in ask(door, accept_language="zh-CN")[2]


def test_large_requests(make):
    door = make()
    assert ask(door, UPLOAD, "POST", b"x" * 1000)[2] == b"in:" + b"x" * 1000
    assert ask(door, UPLOAD, "POST", b"", content_length="1001")[0] == 413
    assert ask(door, UPLOAD, "POST", b"", content_length="-1")[0] == 400
    # One that does not say how long it is ends where it is too long.
    assert ask(door, UPLOAD, "POST", pieces=[b"x" * 600, b"x" * 600])[0] is None
    assert ask(door, JOIN, "POST", pieces=[b"[" * 600, b"x" * 600])[0] == 400


def test_an_event_reaches_the_page_whole(make):
    event = json.dumps({"data": ["<|im_end|>", None]}).encode()
    assert ask(make(), JOIN, "POST", pieces=[event[:9], event[9:]])[2] == b"in:" + event


def test_an_event_names_no_other_file(make, tmp_path):
    (tmp_path / "out").symlink_to("/etc")
    own = {"path": str(tmp_path / "a" / "x.png"), "meta": {"_type": "gradio.FileData"}}

    def event(value):
        return json.dumps({"data": [{"files": [value]}]}).encode()

    check_event(event(own), tmp_path)
    assert ask(make(), JOIN, "POST", event(own))[0] == 200
    bad = ["/etc/passwd", "http://e/x.png", f"{tmp_path}/../x", "x.png", f"{tmp_path}/out/passwd",
           "\0", "", 5, ["x"], "/" + "x" * 5000]  # fmt: skip
    for path in bad:
        with pytest.raises(BadEventError):
            check_event(event({**own, "path": path}), tmp_path)
    twice = b'{"path": "/etc/passwd", "path": "%s"}' % own["path"].encode()
    for body in (twice, b"[" * 100_000, b"\xff", b""):
        with pytest.raises(BadEventError):
            check_event(body, tmp_path)
    assert ask(make(), JOIN, "POST", event({**own, "path": "/etc/passwd"}))[0] == 400
