"""What a URL is taken to mean, before anything is looked up; and how it is shown.

Parsers of URLs disagree about what is odd, and an attacker lives in the difference: what one of
them checks, another one opens. So whatever is odd is refused, and nothing is repaired silently but
the spelling of international names.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import quote, unquote_to_bytes

from vlmtune.errors import FetchError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_LENGTH = 8192
DEFAULT_PORTS = {"http": 80, "https": 443}

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_PARTS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)(?:#.*)?")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# "0x7f000001", "017700000001", "127.1": what the C library would read as an address.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DOTS = re.compile("[\u3002\uff0e\uff61]")
# Old and new rules for international names lead to different hosts here: IDNA 2003 and 2008.
_AMBIGUOUS = re.compile("[ßẞς]")
_DATA = re.compile(
    r"data:image/[a-z0-9][a-z0-9.+-]*(?:;[^,;]*)*?(?P<base64>;base64)?,", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that is well-formed and of an allowed scheme and port. Its address is not judged yet.

    Attributes:
        scheme: ``http`` or ``https``.
        host: An ASCII name in lower case without its last dot, or an IP address.
        port: Where to connect.
        path: Path and query as they are sent, percent-encoded.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def address(self) -> IPAddress | None:
        """The host where it is an address, not a name."""
        return _address(self.host)

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL again, normalised."""
        return f"{self.scheme}://{self.authority}{self.path}"


def is_url(text: str) -> bool:
    """Whether a text is meant as a URL, and not as the name of a file."""
    return bool(re.match(r"\s*(?:data:|[A-Za-z][A-Za-z0-9+.-]+://)", text, re.IGNORECASE))


def is_data_url(text: str) -> bool:
    """Whether a URL holds its own content."""
    return text[:5].lower() == "data:"


def parse(url: str, ports: frozenset[int]) -> Target:
    """Take a URL apart.

    Raises:
        FetchError: ``url_not_allowed``.
    """
    judge_characters(url)
    parts = _PARTS.fullmatch(url)
    if parts is None or parts[1].lower() not in DEFAULT_PORTS:
        _refuse(url, "only http:// and https:// are opened")
    scheme = parts[1].lower()
    if "@" in parts[2]:
        _refuse(url, "it holds a user name or password; leave them out (they were not used)")
    host, port = _host_and_port(url, parts[2], DEFAULT_PORTS[scheme])
    if port not in ports:
        allowed = ", ".join(map(str, sorted(ports)))
        _refuse(url, f"port {port} is not allowed (allowed: {allowed})")
    path = parts[3] if parts[3].startswith("/") else "/" + parts[3]
    return Target(scheme, host, port, quote(path, safe="/?:@!$&'()*+,;=%~[]"))


def judge_characters(url: str) -> None:
    """Refuse what is invisible, or what some parsers drop and others turn into a slash.

    Raises:
        FetchError: ``url_not_allowed``.
    """
    if len(url) > MAX_LENGTH:
        _refuse(url, f"it has {len(url):,} characters, at most {MAX_LENGTH:,} are allowed")
    for char in url:
        if char == "\\" or not char.isprintable() or char.isspace():
            _refuse(
                url,
                f"it holds the character U+{ord(char):04X}; write spaces and the like as %20",
            )


def _host_and_port(url: str, authority: str, default: int) -> tuple[str, int]:
    # Square brackets mean an IPv6 address; ":" stands nowhere else than before the port.
    parts = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", authority, re.ASCII)
    if parts is None:
        _refuse(url, "its host is missing or malformed")
    port = int(parts[2]) if parts[2] else default
    if parts[1].startswith("["):
        address = _address(parts[1][1:-1])
        if address is None or address.version != 6:
            _refuse(url, "what stands in [ ] is no IPv6 address")
        return str(address), port
    return _host(url, parts[1]), port


def _host(url: str, text: str) -> str:
    """A name's one spelling in ASCII, or an IPv4 address in its usual spelling."""
    name = _DOTS.sub(".", text.lower())
    if _AMBIGUOUS.search(name):
        _refuse(url, "its host can be read in two ways; write it in its xn-- form")
    if not name.isascii():  # full-width letters become plain ones here, too (RFC 3491)
        try:
            name = name.encode("idna").decode("ascii").lower()
        except UnicodeError:
            _refuse(url, "its host is no valid international name")
    name = name.removesuffix(".")
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        _refuse(url, "its host is no valid name")
    if _NUMBER.fullmatch(labels[-1]):
        address = _address(name)
        if address is None:
            _refuse(url, "its host is an unusual spelling of an IP address")
        return str(address)
    if len(labels) == 1:
        _refuse(url, f"{name!r} is a name of the local network; expected a full one (example.org)")
    return name


def _address(text: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The image that a ``data:`` URL holds. Opens nothing.

    Raises:
        FetchError: ``url_not_allowed`` if it is no image or malformed, ``url_too_large``.
    """
    head = _DATA.match(url[:MAX_LENGTH])
    if head is None:
        _refuse(url, "expected data:image/TYPE;base64,…")
    payload = url[head.end() :]
    # Each byte takes at most three characters (%41), and in base64 at least 4/3.
    if len(payload) > 3 * max_bytes + 4:
        _too_large(url, max_bytes)
    try:
        content = unquote_to_bytes(payload.encode("ascii"))
        if head["base64"]:
            content = base64.b64decode(content, validate=True)
    except (ValueError, binascii.Error):
        _refuse(url, "its content is not valid base64" if head["base64"] else "it is not ASCII")
    if len(content) > max_bytes:
        _too_large(url, max_bytes)
    if not content:
        _refuse(url, "it is empty")
    return content


def shown(url: str) -> str:
    """A URL as it may be printed and logged: no credentials, no control characters, not long.

    The query goes too: signed links carry their key there.
    """
    if is_data_url(url):
        return f"{printable(url[:40].split(',')[0])},… ({len(url):,} characters)"
    before, separator, after = url.partition("://")
    if not separator or not _SCHEME.fullmatch(before):
        return printable(re.split(r"[?#]", url.rpartition("@")[2], maxsplit=1)[0])[:120]
    authority = re.split(r"[/?#]", after, maxsplit=1)[0]
    path = re.split(r"[?#]", after[len(authority) :], maxsplit=1)[0]
    host = authority.rpartition("@")[2]
    rest = "?…" if "?" in after else ""
    if "@" in path and not re.fullmatch(r"[^:]*(:[0-9]*)?|\[[0-9a-fA-F:.]*\](:[0-9]*)?", host):
        host, path = "…", ""  # a password with a slash in it
    text = printable(f"{before}://{host}{path}")
    return (text if len(text) <= 160 else text[:160] + "…") + rest


def printable(text: str) -> str:
    """Text with everything escaped that could move a cursor, end a line or turn its direction."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _refuse(url: str, reason: str) -> NoReturn:
    raise FetchError("url_not_allowed", f"{shown(url)} is not opened: {reason}.")


def _too_large(url: str, max_bytes: int) -> NoReturn:
    raise FetchError("url_too_large", f"{shown(url)} holds more than {max_bytes:,} bytes.")
