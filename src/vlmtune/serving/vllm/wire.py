"""HTTP to a vLLM server on a unix socket: whole answers, and streams of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11

PIECE = 65_536
GET_SECONDS = 5.0
DONE = b"[DONE]"
GENERATE = "/inference/v1/generate"


class WireError(Exception):
    """vLLM answered with an error, or not at all.

    Args:
        message: What it said; for our log, not for whoever asked.
        status: The HTTP status, or 0 where there was none.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Reply:
    """An answer while it is read.

    Attributes:
        status: The HTTP status.
        pieces: The body as it comes.
    """

    status: int
    pieces: AsyncIterator[bytes]

    async def whole(self) -> bytes:
        """All of the body."""
        return b"".join([piece async for piece in self.pieces])


class Wire:
    """A client of one server; every request has a connection of its own, whose end cancels it.

    Args:
        socket: Where the server listens.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a plain request; status 0 where nobody answers."""
        try:
            async with asyncio.timeout(GET_SECONDS), self._exchange("GET", path) as reply:
                return reply.status, await reply.whole()
        except (WireError, TimeoutError):
            return 0, b""

    async def generate(self, question: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The events of one answer.

        Raises:
            WireError: If there is none, or no rest of it.
        """
        body = json.dumps(question).encode()
        async with self._exchange("POST", GENERATE, body) as reply:
            if reply.status != 200:
                text = (await reply.whole())[:2000].decode("utf-8", "replace")
                raise WireError(f"status {reply.status}: {text}", reply.status)
            async for event in _events(reply.pieces):
                if "error" in event:
                    error = event["error"]
                    code = error.get("code") if isinstance(error, dict) else 0
                    raise WireError(str(error)[:2000], code if isinstance(code, int) else 0)
                yield event

    @asynccontextmanager
    async def _exchange(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Reply]:
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._socket))
        except OSError as error:
            raise WireError(f"no connection: {error}") from error
        connection = h11.Connection(h11.CLIENT)
        headers = [("host", "vllm"), ("connection", "close")]
        if body:
            headers += [("content-type", "application/json"), ("content-length", str(len(body)))]
        try:
            for event in (
                h11.Request(method=method, target=path, headers=headers),
                *([h11.Data(data=body)] if body else []),
                h11.EndOfMessage(),
            ):
                writer.write(connection.send(event) or b"")
            await writer.drain()
            status = await _status(connection, reader)
            yield Reply(status, _pieces(connection, reader))
        except (OSError, h11.RemoteProtocolError) as error:
            raise WireError(f"the connection broke: {error}") from error
        finally:
            writer.close()


async def _next(connection: h11.Connection, reader: asyncio.StreamReader) -> Any:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await reader.read(PIECE))
    return event


async def _status(connection: h11.Connection, reader: asyncio.StreamReader) -> int:
    event = await _next(connection, reader)
    while isinstance(event, h11.InformationalResponse):
        event = await _next(connection, reader)
    assert isinstance(event, h11.Response)
    return event.status_code


async def _pieces(connection: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while isinstance(event := await _next(connection, reader), h11.Data):
        yield bytes(event.data)


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events, up to the one that says that it was the last."""
    buffer = b""
    async for piece in pieces:
        buffer += piece
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            name, _, data = line.strip().partition(b":")
            if name != b"data" or not data.strip():
                continue
            if data.strip() == DONE:
                return
            yield json.loads(data)
    raise WireError("the stream ended before the answer did")
