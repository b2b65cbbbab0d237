"""Running the application: a socket, time limits for headers, and an end without loss."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import threading
from asyncio import TimerHandle, Transport
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlmtune.errors import UsageError
from vlmtune.serving.limits import Limits

Ready = Callable[[str], None]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(host: str, port: int) -> None:
    """Find out whether a port is free, before minutes go into loading a model.

    Raises:
        UsageError: If it is not.
    """

    async def bind() -> None:
        server = await asyncio.start_server(lambda *_: None, host, port)
        server.close()
        await server.wait_closed()

    try:
        asyncio.run(bind())
    except OSError as error:
        raise _taken(host, port, error.strerror or str(error)) from None


def _taken(host: str, port: int, reason: str) -> UsageError:
    return UsageError(
        f"--port: cannot listen on {host} port {port}: {reason}. Choose another --port (0 takes "
        "any), or another --host"
    )


def make_server(app: FastAPI, host: str, port: int, limits: Limits, ready: Ready) -> Server:
    """A server that is not running yet.

    Args:
        app: The application.
        host: Address to listen on.
        port: Port; 0 takes any that is free.
        limits: Time limits and how many connections.
        ready: Called with the URL once requests are answered.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=type("Impatient", (Impatient,), {"limits": limits}),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(int(limits.drain_seconds), 1),
    )
    return Server(config, ready)


def run(server: Server) -> None:
    """Serve until a signal says to end; running answers are finished first.

    Raises:
        UsageError: If the port is taken.
    """
    with _ended_by_signals():
        try:
            server.run()
        except SystemExit:  # uvicorn's way to say so
            config = server.config
            raise _taken(config.host, config.port, "it is taken, or no address of ours") from None


class Server(uvicorn.Server):
    """Says when it is ready.

    Args:
        config: uvicorn's configuration.
        ready: Called with the URL.
    """

    def __init__(self, config: uvicorn.Config, ready: Ready) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: Any = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # every address: ours, too
        self._ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let uvicorn drain on SIGTERM and SIGINT; it then sends itself the signal once more."""

    def nothing(*_: object) -> None:
        """The server has ended already."""

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's business
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {each: signal.signal(each, nothing) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Impatient(H11Protocol):
    """HTTP/1.1 that waits for nobody for ever.

    uvicorn limits how long an idle connection is kept, not how long a client may take to send its
    headers; hundreds that send a byte a second would hold all file descriptors.
    """

    limits = Limits()
    _timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Take a connection, or close it at once where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Read on."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        """Count the time while headers are awaited, or the rest of a body that was refused."""
        headers = self.conn.their_state is h11.IDLE
        rest = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if not (headers or rest):
            self._unwatch()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.limits.header_seconds, self._hang_up)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hang_up(self) -> None:
        self._timer = None
        self.transport.close()
