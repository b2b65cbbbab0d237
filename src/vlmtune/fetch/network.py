"""Which addresses are public, and the three things that touch the network: one table of them."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmtune.fetch.urls import IPAddress

# IANA's special-purpose registries (RFC 6890), written out: ``ipaddress.is_global`` differs between
# versions of Python, and 3.11 holds 64:ff9b::7f00:1 (NAT64 of 127.0.0.1) and multicast for global.
NOT_PUBLIC_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; also Alibaba's metadata
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host service: looks public, answers each virtual machine
        "169.254.0.0/16",  # link-local; the clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# All that is handed out; loopback, mapped IPv4, NAT64, fc00::/7, fe80::/10, ff00::/8 lie outside.
PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
NOT_PUBLIC_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # Teredo, ORCHID, benchmarks
        "2001:db8::/32",
        "2002::/16",  # 6to4 holds any IPv4 address
        "3fff::/20",
    )
)


def is_public(address: IPAddress) -> bool:
    """Whether an address is one of the public internet, and holds no other address in itself."""
    if isinstance(address, ipaddress.IPv4Address):
        special = any(address in network for network in NOT_PUBLIC_V4)
    else:
        special = address not in PUBLIC_V6 or any(address in net for net in NOT_PUBLIC_V6)
    return not special and address.is_global


def resolve(host: str, port: int, seconds: float) -> Sequence[IPAddress]:
    """All addresses of a name, in the system's order of preference.

    Raises:
        OSError: The name is unknown.
        TimeoutError: The name servers are slow; ``getaddrinfo`` knows no time limit of its own.
    """
    found: list[IPAddress] = []
    failures: list[OSError] = []

    def look_up() -> None:
        try:
            for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                # A link-local address comes with its interface: fe80::1%eth0.
                found.append(ipaddress.ip_address(str(place[0]).partition("%")[0]))
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=look_up, name=f"look up {host}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no address for {host} within {seconds:g} s")
    if failures:
        raise failures[0]
    return list(dict.fromkeys(found))


def connect(address: IPAddress, port: int, seconds: float) -> socket.socket:
    """A connection to this very address; no name is looked up."""
    return socket.create_connection((str(address), port), timeout=seconds)


@dataclass(frozen=True, slots=True)
class Network:
    """What fetching does to the world outside. Tests put their own in its place.

    Attributes:
        resolve: Host, port, seconds -> addresses.
        connect: Address, port, seconds -> connected socket.
        tls: Makes the context that checks certificates.
    """

    resolve: Callable[[str, int, float], Sequence[IPAddress]] = resolve
    connect: Callable[[IPAddress, int, float], socket.socket] = connect
    tls: Callable[[], ssl.SSLContext] = ssl.create_default_context


INTERNET = Network()
