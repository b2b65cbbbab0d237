"""Servers on this machine for the tests of fetching: sites that misbehave, and canaries.

A canary counts connections at its socket: whoever reaches it was not stopped.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from vlmtune.fetch.network import IPAddress, Network, connect

Send = Callable[[bytes], None]
Handler = Callable[[str, Send], None]


class Site:
    """A server on a loopback address.

    Args:
        handler: Gets the path that was asked for, and what sends bytes back.
        tls: Serve https.
        greeting: Sent before anything is read.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        greeting: bytes = b"",
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.hits = 0
        self.sent = 0
        self.requests: list[str] = []
        self._handler, self._tls, self._greeting = handler, tls, greeting
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.hits += 1
            self._open.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        served = connection
        with contextlib.suppress(OSError, ValueError):
            if self._tls is not None:
                served = self._tls.wrap_socket(connection, server_side=True)
                self._open.add(served)
            served.sendall(self._greeting)
            text = b""
            while b"\r\n\r\n" not in text:
                if not (part := served.recv(65536)):
                    break
                text += part
            self.requests.append(text.decode("latin-1"))
            path = text.split(b" ", 2)[1].decode("latin-1") if text.count(b" ") >= 2 else ""

            def send(data: bytes) -> None:
                served.sendall(data)
                self.sent += len(data)

            self._handler(path, send)
            with contextlib.suppress(OSError):
                served.shutdown(socket.SHUT_RDWR)
        served.close()
        connection.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listener.close()
        self._accepting.join(5)
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)


def answer(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    """A whole HTTP answer; ``content_type="…"`` becomes ``Content-Type``."""
    headers = {"content_length": str(len(body)), **headers}
    lines = [f"{name.replace('_', '-').title()}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("utf-8") + body


class Canaries:
    """Listeners at the same port of 127.0.0.1 and ::1."""

    def __init__(self) -> None:
        def sing(_path: str, send: Send) -> None:
            send(answer(b"the secret of this machine"))

        while True:
            first = Site(sing)
            try:
                second = Site(sing, host="::1", port=first.port)
            except OSError:
                first.close()
                continue
            break
        self.sites = (first, second)
        self.port = first.port

    def hits(self) -> int:
        """Connections so far. Our own come last in the queues, so that none before is missed."""
        for site, host in zip(self.sites, ("127.0.0.1", "::1"), strict=True):
            with socket.create_connection((host, site.port), timeout=5) as own:
                own.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert own.recv(8) == b"HTTP/1.1"
            site.hits -= 1
        return sum(site.hits for site in self.sites)

    def close(self) -> None:
        for site in self.sites:
            site.close()


class FakeInternet:
    """Look-ups and connections that tests rule, and a record of both.

    Args:
        names: Addresses of each name. A list of lists answers each look-up differently. A name
            that is not in it leads to this machine, as 127.0.0.1.nip.io does.
        sites: What stands at a public address. Any other address is connected to in earnest.
        tls: Certificates that are trusted.
    """

    def __init__(
        self,
        names: Mapping[str, Sequence[str] | Sequence[Sequence[str]]] | None = None,
        sites: Mapping[str, Site] | None = None,
        tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> None:
        self.names, self.sites, self.tls = dict(names or {}), dict(sites or {}), tls
        self.looked_up: list[str] = []
        self.connected: list[str] = []

    @property
    def network(self) -> Network:
        return Network(resolve=self._resolve, connect=self._connect, tls=self.tls)

    def _resolve(self, host: str, _port: int, _seconds: float) -> Sequence[IPAddress]:
        self.looked_up.append(host)
        found = self.names.get(host, ["127.0.0.1", "::1"])
        if found and not isinstance(found[0], str):
            found = found[min(self.looked_up.count(host), len(found)) - 1]
        return [ipaddress.ip_address(address) for address in found]

    def _connect(self, address: IPAddress, port: int, seconds: float) -> socket.socket:
        self.connected.append(f"{address} {port}")
        if (site := self.sites.get(str(address))) is not None:
            return socket.create_connection(("127.0.0.1", site.port), timeout=seconds)
        return connect(address, port, seconds)


@contextlib.contextmanager
def closing_all(*sites: Site | Canaries) -> Iterator[None]:
    try:
        yield
    finally:
        for site in sites:
            site.close()
