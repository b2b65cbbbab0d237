"""The only place that opens a URL (the hubs' own libraries aside).

Whoever may name a URL may try to make this machine ask its own services, its neighbours or a
cloud's metadata address for them. So, in words:

- Only http and https, on the ports that are allowed, without user names; ``data:`` URLs are decoded
  and open nothing.
- A host is looked up once; *every* address it has must be public, and the connection goes to one of
  the very addresses that were judged. A second look-up could answer otherwise (DNS rebinding).
- Redirects are followed by hand, and every hop is judged like the first.
- The environment's proxies are ignored: a proxy would look the host up again, inside our network.
- No cookies, no content encoding; the size is limited while reading, the time in total.

The approach is that of vLLM's and Gradio's repaired fetchers; see RFC 6890 for the addresses.
"""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urljoin

from pydantic import Field

from vlmtune.config import Config
from vlmtune.errors import FetchError
from vlmtune.fetch.exchange import Answer, Deadline, TooMuchError, exchange
from vlmtune.fetch.network import INTERNET, Network, is_public
from vlmtune.fetch.urls import (
    IPAddress,
    Target,
    decode_data_url,
    is_data_url,
    is_url,
    judge_characters,
    parse,
    printable,
    shown,
)

__all__ = ["FetchLimits", "Network", "decode_data_url", "fetch_image_bytes", "is_url", "shown"]

REDIRECTS = (301, 302, 303, 307, 308)


class FetchLimits(Config):
    """How far one fetch may go.

    Attributes:
        max_bytes: Largest body.
        max_redirects: Most redirects.
        ports: Ports that a URL may name.
        domains: Hosts that may be opened, and those below them, redirects included; None: any.
        connect_seconds: Longest look-up, and longest connecting to one address.
        read_seconds: Longest silence of a server.
        total_seconds: Longest fetch, look-ups and redirects included.
    """

    max_bytes: int = Field(default=64 * 2**20, gt=0)
    max_redirects: int = Field(default=5, ge=0)
    ports: frozenset[int] = frozenset({80, 443})
    domains: frozenset[str] | None = None
    connect_seconds: float = Field(default=5.0, gt=0)
    read_seconds: float = Field(default=10.0, gt=0)
    total_seconds: float = Field(default=30.0, gt=0)


def fetch_image_bytes(
    url: str, limits: FetchLimits | None = None, *, network: Network = INTERNET
) -> bytes:
    """The bytes that a URL names. Whether they are a picture, ``data.media`` decides.

    Args:
        url: ``http:``, ``https:``, or ``data:image/…``.
        limits: Size, time, ports.
        network: Look-up, connection, certificates; another one is for tests only.

    Raises:
        FetchError: With one of the ``url_*`` codes.
    """
    limits = limits or FetchLimits()
    if is_data_url(url):
        return decode_data_url(url, limits.max_bytes)
    deadline = Deadline(limits.total_seconds)
    target = parse(url, limits.ports)
    for _ in range(limits.max_redirects + 1):
        _judge_domain(target, limits.domains)
        with _faults(target, limits):
            answer = _get(target, limits, deadline, network)
        if answer.status not in REDIRECTS:
            return _body(answer, target)
        target = _redirected(target, answer, limits.ports)
    raise FetchError(
        "url_not_allowed",
        f"{shown(url)} leads on and on: more than {limits.max_redirects} redirects. Give the "
        "address that they end at.",
    )


def _judge_domain(target: Target, domains: frozenset[str] | None) -> None:
    """Before anything is looked up: a look-up tells a stranger's name server who asks."""
    below = [target.host.split(".", count)[-1] for count in range(target.host.count(".") + 1)]
    if domains is not None and domains.isdisjoint(below):
        raise FetchError(
            "url_not_allowed",
            f"{shown(target.url)} is not opened: {target.host} is not among the domains that may "
            "be opened. Send the image itself.",
        )


def _get(target: Target, limits: FetchLimits, deadline: Deadline, network: Network) -> Answer:
    """One request to one of the host's addresses, all of which are public."""
    addresses = _public_addresses(target, deadline.left(limits.connect_seconds), network)
    failure: OSError | None = None
    for address in addresses:
        seconds = deadline.left(limits.connect_seconds)
        try:
            connection = network.connect(address, target.port, seconds)
        except OSError as error:
            failure = error
            continue
        with closing(connection):
            if target.scheme == "https":
                connection.settimeout(deadline.left(limits.connect_seconds))
                # The name's certificate, whatever address we went to.
                connection = network.tls().wrap_socket(connection, server_hostname=target.host)
            with closing(connection):
                return exchange(
                    connection,
                    target,
                    deadline=deadline,
                    read_seconds=limits.read_seconds,
                    max_bytes=limits.max_bytes,
                )
    raise failure or OSError("it has no address")


def _public_addresses(target: Target, seconds: float, network: Network) -> tuple[IPAddress, ...]:
    literal = target.address
    found = (literal,) if literal else tuple(network.resolve(target.host, target.port, seconds))
    if not all(is_public(address) for address in found):
        # The address itself is not named: a server's user could map our network with it.
        raise FetchError(
            "url_not_allowed",
            f"{shown(target.url)}: {target.host} is, or has, an address that is not on the public "
            "internet (this machine, a private network, a cloud's metadata). Download the image "
            "yourself and give the file.",
        )
    return found


def _redirected(target: Target, answer: Answer, ports: frozenset[int]) -> Target:
    """Where a redirect leads, judged like a URL that was given."""
    try:
        # Servers send UTF-8; http.client reads every header as Latin-1.
        location = (answer.location or "").encode("latin-1").decode("utf-8")
        judge_characters(location)
        following = parse(urljoin(target.url, location), ports) if location else None
    except (ValueError, FetchError) as error:
        reason = str(error) if isinstance(error, FetchError) else "its Location makes no URL"
        raise FetchError(
            "url_not_allowed",
            f"{shown(target.url)} redirects to what may not be opened: {reason}",
        ) from None
    if following is None:
        raise FetchError(
            "url_bad_answer", f"{shown(target.url)} redirects without saying where to."
        )
    if (target.scheme, following.scheme) == ("https", "http"):
        raise FetchError(
            "url_not_allowed",
            f"{shown(target.url)} redirects from https to plain http ({shown(following.url)}): the "
            "image could be changed on its way. Give that address yourself if you trust it.",
        )
    return following


def _body(answer: Answer, target: Target) -> bytes:
    if answer.status != http.client.OK:
        raise FetchError(
            "url_bad_answer",
            f"{shown(target.url)}: the server answered {answer.status} "
            f"{printable(answer.reason)[:80]}, expected 200. Check the address in a browser that "
            "is not logged in.",
        )
    if not answer.body:
        raise FetchError("url_bad_answer", f"{shown(target.url)}: the server sent no bytes.")
    return answer.body


@contextmanager
def _faults(target: Target, limits: FetchLimits) -> Iterator[None]:
    """What goes wrong below, in words for people."""
    name = shown(target.url)
    try:
        yield
    except TooMuchError:
        raise FetchError(
            "url_too_large",
            f"{name}: the server sends more than {limits.max_bytes:,} bytes. Make the image "
            "smaller, or download it and give the file.",
        ) from None
    except TimeoutError:
        raise FetchError(
            "url_timeout",
            f"{name}: no answer in time (at most {limits.connect_seconds:g} s to connect, "
            f"{limits.read_seconds:g} s of silence, {limits.total_seconds:g} s in total). Try "
            "again, or download the image and give the file.",
        ) from None
    except ssl.SSLCertVerificationError as error:
        raise FetchError(
            "url_unreachable",
            f"{name}: the certificate does not prove that this is {target.host} "
            f"({printable(error.verify_message)}). Nothing was fetched.",
        ) from None
    except http.client.HTTPException as error:
        raise FetchError(
            "url_bad_answer",
            f"{name}: the server's answer is broken or cut short "
            f"({printable(str(error) or type(error).__name__)[:120]}). Try again, or download the "
            "image and give the file.",
        ) from None
    except OSError as error:
        raise FetchError(
            "url_unreachable",
            f"{name}: {target.host} could not be reached "
            f"({printable(error.strerror or str(error))[:120]}). Check the address and the "
            "network; proxies are not used.",
        ) from None
