"""A server on 127.0.0.1 that speaks as much of SwanLab's and W&B's protocols as a run needs, and
misbehaves where it is told to.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SOON = "2099-01-01T00:00:00.000Z"
TROUBLES = ("hang", "error", "reset", "slow", "bad_key")


class TrackHub(ThreadingHTTPServer):
    """The server.

    Attributes:
        trouble: One of ``TROUBLES``; None while it behaves.
        asked: Method and path of every request, and its body.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.trouble: str | None = None
        self.asked: list[tuple[str, bytes]] = []
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def recover(self) -> None:
        """Behave from now on, and let go of those that hang."""
        self.trouble = None
        self.released.set()
        self.released = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was treated badly went away."""


@contextlib.contextmanager
def trackhub() -> Iterator[TrackHub]:
    """The server while it runs."""
    hub = TrackHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: TrackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((f"{self.command} {self.path}", body))
        if self.server.trouble is not None:
            self._misbehave(self.server.trouble)
            return
        status, answer = _answer(self.server.url, self.command, self.path, body)
        self._say(status, json.dumps(answer).encode())

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _misbehave(self, how: str) -> None:
        self.close_connection = True
        if how == "hang":
            self.server.released.wait(600)
        elif how == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        elif how == "slow":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            while not self.server.released.wait(1):
                self.wfile.write(b" ")
                self.wfile.flush()
        else:
            self._say(401 if how == "bad_key" else 500, b'{"code": "x", "message": "no"}')


def _answer(here: str, method: str, path: str, body: bytes) -> tuple[int, Any]:
    if path.startswith("/graphql"):
        return 200, _graphql(here, json.loads(body))
    if path.endswith("/login/api_key"):
        return 200, {"sid": "s", "expiredAt": SOON, "userInfo": {"username": "me", "name": "me"}}
    if method == "POST" and path.endswith("/experiment"):
        return 201, {"cuid": json.loads(body)["cuid"], "slug": "slug", "name": "run"}
    if method == "GET" and re.fullmatch(r"/api/project/\w+/\w+", path):
        return 200, {
            "cuid": "project",
            "name": path.rsplit("/", 1)[1],
            "path": "/me/p",
            "group": {"username": "me"},
            "_count": {"experiments": 0},
        }
    if path.endswith("/presigned/put"):
        count = len(json.loads(body)["paths"])
        return 200, {"urls": [f"{here}/put/{number}" for number in range(count)]}
    return 200, {}


def _graphql(here: str, request: dict[str, Any]) -> dict[str, Any]:
    told = request.get("variables") or {}
    entity = {"id": "e", "name": "me"}
    bucket = {
        "id": "bucket",
        "name": told.get("name"),
        "displayName": told.get("displayName"),
        "project": {"id": "project", "name": "p", "entity": entity},
    }
    files = [{"name": name, "uploadUrl": f"{here}/put/{name}"} for name in told.get("files") or ()]
    artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
    answers = {
        "Viewer": {"viewer": {"id": "v", "entity": "me", "username": "me"}},
        "RunResumeStatus": {"model": {"id": "m", "name": "p", "entity": entity, "bucket": None}},
        "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
        "ArtifactType": {"project": None},
        "CreateArtifact": {"createArtifact": {"artifact": artifact}},
        "UseArtifact": {"useArtifact": {"artifact": {"id": "a"}}},
        "ServerFeaturesQuery": {"serverInfo": {"features": []}},
        "CreateRunFiles": {"createRunFiles": {"runID": "bucket", "files": files}},
    }
    return {"data": answers.get(_operation(request), {})}


def _operation(request: dict[str, Any]) -> str:
    found = re.match(r"\s*(?:query|mutation)\s+(\w+)", request["query"])
    return found[1] if found else ""
