"""One request and its answer on a connection that stands already."""

from __future__ import annotations

import http.client
import io
import re
import socket
import time
from dataclasses import dataclass
from typing import Any

from vlmtune.fetch.urls import Target

CHUNK = 2**16
HEADERS = {
    "User-Agent": "vlmtune",
    "Accept": "image/*",
    # A compressed megabyte may hold a gigabyte; pictures are compressed already.
    "Accept-Encoding": "identity",
    "Connection": "close",
}


class TooMuchError(Exception):
    """The server sends more than is allowed."""


class Deadline:
    """The moment when a fetch ends, whatever it is doing."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, at_most: float) -> float:
        """Seconds for the next step, more than 0.

        Raises:
            TimeoutError: None are left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the fetch took too long")
        return min(left, at_most)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered. ``body`` is read for status 200 only."""

    status: int
    reason: str
    location: str | None
    body: bytes


def exchange(
    connection: socket.socket,
    target: Target,
    *,
    deadline: Deadline,
    read_seconds: float,
    max_bytes: int,
) -> Answer:
    """Send a GET and read its answer.

    Raises:
        TooMuchError: More than ``max_bytes``.
        TimeoutError: The server is silent, or the deadline has passed.
        http.client.HTTPException: What came is no complete, plain answer.
        OSError: The connection broke.
    """
    line = _Line(connection, deadline, read_seconds, max_bytes)
    client = http.client.HTTPConnection(target.host, target.port)
    client.sock = line  # connected already: http.client looks nothing up
    client.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
    client.putheader("Host", target.authority)
    for name, value in HEADERS.items():
        client.putheader(name, value)
    client.endheaders()
    with client.getresponse() as response:
        body = b""
        if response.status == http.client.OK:
            body = _body(response, max_bytes)
        return Answer(response.status, response.reason, response.getheader("Location"), body)


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    headers = response.headers
    encoding = headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() not in ("identity", ""):
        raise http.client.HTTPException(f"content encoding {encoding}, which was not asked for")
    transfer = headers.get_all("Transfer-Encoding", [])
    if transfer and [value.strip().lower() for value in transfer] != ["chunked"]:
        raise http.client.HTTPException(f"transfer encoding {', '.join(transfer)}")
    length = _promised(headers.get_all("Content-Length", []))
    if length is not None and length > max_bytes:
        raise TooMuchError
    parts, received = [], 0
    while part := response.read(CHUNK):
        received += len(part)
        if received > max_bytes:
            raise TooMuchError
        parts.append(part)
    if length is not None and not transfer and received != length:
        raise http.client.IncompleteRead(b"", length - received)
    return b"".join(parts)


def _promised(lengths: list[str]) -> int | None:
    if not lengths:
        return None
    if len(set(lengths)) > 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0].strip(), re.ASCII):
        raise http.client.HTTPException(f"content length {', '.join(lengths)}")
    return int(lengths[0])


class _Line:
    """What http.client takes for a socket: one whose every read ends in time and stays in bounds.

    A socket's own time limit starts anew with each byte, and http.client reads without bounds where
    a chunk says that it has -1 bytes. So both are limited here, below http.client.
    """

    def __init__(
        self, connection: socket.socket, deadline: Deadline, read_seconds: float, max_bytes: int
    ) -> None:
        self._connection, self._deadline = connection, deadline
        self._read_seconds = read_seconds
        # Headers, and what chunks add: a server that sends every 8 bytes alone is refused.
        self._max_bytes = 2 * max_bytes + 2**20

    def sendall(self, data: bytes) -> None:
        self._connection.settimeout(self._deadline.left(self._read_seconds))
        self._connection.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(
            _Received(self._connection, self._deadline, self._read_seconds, self._max_bytes)
        )

    def close(self) -> None:
        """Nothing: http.client closes before it has read; who opened the connection closes it."""


class _Received(io.RawIOBase):
    def __init__(
        self, connection: socket.socket, deadline: Deadline, read_seconds: float, max_bytes: int
    ) -> None:
        self._connection, self._deadline = connection, deadline
        self._read_seconds, self._bytes_left = read_seconds, max_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(self._deadline.left(self._read_seconds))
        count = self._connection.recv_into(buffer)
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise TooMuchError
        return count
