"""Fetching opens what is public and small and prompt, and nothing else.

That nothing is opened is counted at the sockets of canaries; and each canary is shown to sing where
a check is taken away, or where a naive client is given the same URL.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import itertools
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmtune.fetch
from vlmtune.errors import FetchError
from vlmtune.fetch import FetchLimits, decode_data_url, fetch_image_bytes, is_url, shown
from vlmtune.fetch.network import INTERNET, Network, is_public, resolve
from vlmtune.fetch.urls import parse, printable
from websites import Canaries, FakeInternet, Site, answer, closing_all

PUBLIC = "93.184.215.14"
OTHER = "151.101.1.195"
PICTURE = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def canaries():
    found = Canaries()
    with closing_all(found):
        yield found


@pytest.fixture
def site():
    """Starts sites that are closed after the test."""
    started = []

    def start(handler, **options):
        if isinstance(handler, bytes):
            content = handler
            started.append(Site(lambda _path, send: send(content), **options))
        else:
            started.append(Site(handler, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()


def fetch(site, url="http://images.example.org/f.png", **limits):
    """Fetch from a site that stands at a public address."""
    internet = FakeInternet({"images.example.org": [PUBLIC]}, {PUBLIC: site})
    return fetch_image_bytes(url, FetchLimits(**limits), network=internet.network)


def refusal(call, *arguments, **options) -> FetchError:
    with pytest.raises(FetchError) as caught:
        call(*arguments, **options)
    assert caught.value.exit_status == 1
    assert str(caught.value).isprintable()
    return caught.value


# What is refused


LOCAL_HOSTS = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "127.0.0.1.",
    "127.255.255.254",
    "127.127.127.127",
    "0.0.0.0",
    "0",
    "0x0",
    "0.0",
    "2130706433",
    "2130706433.",
    "0x7f000001",
    "0x7F.0x0.0x0.0x1",
    "0x7f.1",
    "017700000001",
    "0177.0.0.1",
    "0177.0.0.01",
    "127.0.0.01",
    "127.0x0.0.1",
    "00000177.0.0.1",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "localhost.localdomain",
    "images.localhost",
    "127.0.0.1.nip.io",
    "localtest.me",
    "spoofed.burpcollaborator.example",
    "127。0。0。1",
    "127．0．0．1",
    "127｡0｡0｡1",
    "１２７.０.０.１",
    "①②⑦.⓪.⓪.①",
    "ｌｏｃａｌｈｏｓｔ",
    "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
    "loc%61lhost",
    "127.0.0.1%00.example.org",
    "127.0.0.1%2eexample.org",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[0000::0001]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2002:7f00:1::1]",
    "[2001:0:7f00:1::]",
    "[::ffff:0:127.0.0.1]",
    "[::1%25lo]",
    "[::1%lo]",
    "[fe80::1%25eth0]",
    "user@127.0.0.1",
    "user:secret@127.0.0.1",
    "images.example.org@127.0.0.1",
    "images.example.org:80@127.0.0.1",
    "images.example.org%40127.0.0.1",
    "127.0.0.1#@images.example.org",
    "127.0.0.1?@images.example.org",
    "127.0.0.1\\@images.example.org",
    "images.example.org\\@127.0.0.1",
    "images.example.org\t@127.0.0.1",
    "127.0.0.1\n",
    "127.0.0.1\r\nX-Evil: 1",
    " 127.0.0.1",
    "127.0.0.1 images.example.org",
    "127.0.0.1\u200b",
    "127.0.0.1\u202e",
    "127.0.0.1\x00",
    "127.0.0.1\x7f",
    "127.0.0.1,images.example.org",
    "127.0.0.1;images.example.org",
    "127.0.0.1&images.example.org",
    "ℓocalhost",
    "xn--",
    "ß.localhost",
    "a" * 64 + ".localhost",
]
ELSEWHERE = [
    "10.0.0.1",
    "10.255.255.255",
    "172.16.0.1",
    "172.31.255.254",
    "192.168.0.1",
    "192.168.255.255",
    "100.64.0.1",
    "100.100.100.200",
    "100.127.255.254",
    "169.254.0.1",
    "169.254.169.254",
    "169.254.170.2",
    "168.63.129.16",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "169.254.43518",
    "[fe80::1]",
    "[febf::1]",
    "[fc00::1]",
    "[fd00::1]",
    "[fd00:ec2::254]",
    "[fec0::1]",
    "[ff02::1]",
    "[2001:db8::1]",
    "[2001:10::1]",
    "[3fff::1]",
    "[100::1]",
    "[5f00::1]",
    "[4000::1]",
    "[::ffff:169.254.169.254]",
    "[::ffff:8.8.8.8]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:a9fe:a9fe::1]",
    "metadata",
    "metadata.google.internal",
    "kubernetes.default.svc",
    "intranet",
]


def hostile(port: int) -> list[str]:
    """URLs that would reach this machine, its neighbours, or something that is no web server."""
    urls = [f"http://{host}:{port}/f.png" for host in LOCAL_HOSTS]
    urls += [f"https://{host}:{port}/f.png" for host in LOCAL_HOSTS[:30]]
    urls += [f"http://{host}/latest/meta-data/" for host in ELSEWHERE]
    urls += [f"https://{host}:{port}/" for host in ELSEWHERE]
    urls += [f"http://images.example.org:{other}/" for other in (22, 25, 6379, 8080, 0, 65536)]
    urls += ["http://images.example.org:80:80/", "http://images.example.org:８０/"]
    urls += ["http://images.example.org:-80/", "http://images.example.org:http/"]
    urls += [
        f"{scheme}://127.0.0.1:{port}/f.png"
        for scheme in ("file", "ftp", "gopher", "dict", "ldap", "ws", "jar", "unix", "http+unix")
    ]
    urls += ["file:///etc/passwd", "FILE:///etc/passwd", "file://localhost/etc/passwd"]
    urls += ["data:text/plain,secret", "data:text/html;base64,PGI+", "data:,x", "data:image/png"]
    urls += ["data:image/png;base64,iVBO!Rw==", "data:image/png;base64,", "javascript:alert(1)"]
    urls += [f"http:127.0.0.1:{port}", f"http:/127.0.0.1:{port}", f"http:///127.0.0.1:{port}/"]
    urls += [f"http:\\\\127.0.0.1:{port}", f"//127.0.0.1:{port}", f"127.0.0.1:{port}"]
    urls += [f"url:http://127.0.0.1:{port}", f" http://127.0.0.1:{port}", f"\thttp://[::1]:{port}"]
    urls += [f"ht\ntp://127.0.0.1:{port}", f"http://[127.0.0.1]:{port}/", f"http://[::1:{port}/"]
    urls += [f"http://::1:{port}/", f"http://[::1]]:{port}/", "http://", "http://:80/", "", "http:"]
    urls += [f"http://127.0.0.1:{port}/" + "a" * 9000, "http://\udc80.example.org/", "http://./"]
    urls += ["http://..example.org/", "http://example..org/", "http://-a.example.org/"]
    return urls


def test_no_hostile_url_reaches_anything(canaries):
    urls = hostile(canaries.port)
    assert len(urls) == len(set(urls)) >= 250
    limits = FetchLimits(ports=frozenset({80, 443, canaries.port}))
    internet = FakeInternet()
    for url in urls:
        error = refusal(fetch_image_bytes, url, limits, network=internet.network)
        assert error.code == "url_not_allowed", url
    assert internet.connected == []
    assert canaries.hits() == 0


def test_without_the_check_of_addresses_the_canary_is_hit(canaries, monkeypatch):
    monkeypatch.setattr(vlmtune.fetch, "is_public", lambda _: True)
    limits = FetchLimits(ports=frozenset({canaries.port}))
    for host in ("127.0.0.1", "127.0.0.1.", "[::1]", "localtest.me", "[::ffff:127.0.0.1]"):
        url = f"http://{host}:{canaries.port}/f.png"
        found = fetch_image_bytes(url, limits, network=FakeInternet().network)
        assert found == b"the secret of this machine", url


def test_a_naive_client_would_have_reached_it(canaries):
    """The corpus is no paper tiger: what the C library reads as this machine, urllib opens."""
    naive = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    reached = 0
    for host in LOCAL_HOSTS:
        # What needs a name server is left out, and what lies in 127.0.0.0/8 beside 127.0.0.1.
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            socket.inet_aton(urlsplit(f"http://{host}").hostname or "")
            with naive.open(f"http://{host}:{canaries.port}/f.png", timeout=2) as response:
                reached += response.read() == b"the secret of this machine"
    assert reached == canaries.hits() >= 15


@pytest.mark.parametrize(
    "addresses",
    [
        [PUBLIC, "127.0.0.1"],
        ["127.0.0.1", PUBLIC],
        [PUBLIC, "::1"],
        ["2606:2800:21f:cb07:6820:80da:af6b:8b2c", "10.0.0.1"],
        [PUBLIC, "fd00::1"],
        [PUBLIC, "64:ff9b::7f00:1"],
        [PUBLIC, "::ffff:127.0.0.1"],
    ],
    ids=" ".join,
)
def test_all_addresses_of_a_name_must_be_public(addresses, canaries, site):
    public = site(answer(PICTURE))
    internet = FakeInternet({"mixed.example.org": addresses}, {PUBLIC: public})
    limits = FetchLimits(ports=frozenset({canaries.port}))
    url = f"http://mixed.example.org:{canaries.port}/"
    error = refusal(fetch_image_bytes, url, limits, network=internet.network)
    assert error.code == "url_not_allowed"
    assert not any(address in str(error) for address in addresses)
    assert (public.hits, internet.connected, canaries.hits()) == (0, [], 0)


@pytest.mark.parametrize("address", ["8.8.8.8", PUBLIC, "1.1.1.1", "172.15.0.1", "172.32.0.1"])
def test_public_v4(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["2606:4700::1111", "2a00:1450:4001::200e", "2001:4860::8888"])
def test_public_v6(address):
    assert is_public(ipaddress.ip_address(address))


# Names are looked up once, and the connection goes to what was judged


def test_rebinding_is_pinned(canaries, site):
    public = site(answer(PICTURE))
    port = canaries.port
    internet = FakeInternet({"rebind.example.org": [[PUBLIC], ["127.0.0.1"]]}, {PUBLIC: public})
    limits = FetchLimits(ports=frozenset({port}))
    url = f"http://rebind.example.org:{port}/"
    assert fetch_image_bytes(url, limits, network=internet.network) == PICTURE
    assert internet.looked_up == ["rebind.example.org"]
    assert internet.connected == [f"{PUBLIC} {port}"]
    # The second answer is private: had it been asked for, or is it now, nothing is opened.
    assert refusal(fetch_image_bytes, url, limits, network=internet.network).code == (
        "url_not_allowed"
    )
    assert (public.hits, canaries.hits()) == (1, 0)


def test_rebinding_between_hops_is_seen(canaries, site):
    port = canaries.port
    again = f"http://rebind.example.org:{port}/2"
    public = site(answer(status="302 Found", location=again))
    internet = FakeInternet({"rebind.example.org": [[PUBLIC], ["127.0.0.1"]]}, {PUBLIC: public})
    limits = FetchLimits(ports=frozenset({port}))
    error = refusal(
        fetch_image_bytes, f"http://rebind.example.org:{port}/1", limits, network=internet.network
    )
    assert error.code == "url_not_allowed"
    assert internet.looked_up == ["rebind.example.org"] * 2
    assert (public.hits, canaries.hits()) == (1, 0)


def test_a_dead_address_gives_way_to_the_next(site):
    public = site(answer(PICTURE))
    calls = []
    internet = FakeInternet({"images.example.org": [OTHER, PUBLIC]}, {PUBLIC: public})

    def connect(address, port, seconds):
        calls.append(str(address))
        if str(address) == OTHER:
            raise ConnectionRefusedError(111, "Connection refused")
        return internet.network.connect(address, port, seconds)

    network = Network(resolve=internet.network.resolve, connect=connect)
    assert fetch_image_bytes("http://images.example.org/", network=network) == PICTURE
    assert calls == [OTHER, PUBLIC]


def test_environment_proxies_are_ignored(canaries, site, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for spelling in (name, name.upper()):
            monkeypatch.setenv(spelling, f"http://127.0.0.1:{canaries.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    public = site(answer(PICTURE))
    assert fetch(public) == PICTURE
    assert (public.hits, canaries.hits()) == (1, 0)
    # A client that heeds them tells the proxy.
    heeding = urllib.request.build_opener()  # urlopen remembers what was set when it first ran
    with heeding.open("http://images.example.org/", timeout=2) as response:
        assert response.read() == b"the secret of this machine"
    assert canaries.hits() == 1


# Redirects


def chain(length):
    """A site at whose /0 a chain of redirects begins."""

    def handler(path, send):
        step = int(path.strip("/"))
        if step < length:
            send(answer(status=f"{(301, 302, 303, 307, 308)[step % 5]} x", location=f"/{step + 1}"))
        else:
            send(answer(PICTURE))

    return handler


@pytest.mark.parametrize("length", range(1, 12))
def test_a_chain_of_redirects(length, site):
    public = site(chain(length))
    if length <= 5:
        assert fetch(public, "http://images.example.org/0") == PICTURE
        assert public.hits == length + 1
    else:
        error = refusal(fetch, public, "http://images.example.org/0")
        assert error.code == "url_not_allowed"
        assert "5 redirects" in str(error)
        assert public.hits == 6


@pytest.mark.parametrize("after", [0, 1, 4])
def test_no_redirect_reaches_what_is_hostile(after, canaries, site):
    """Every hostile URL again, as the end of a redirect."""
    port = canaries.port
    target = ""

    def handler(path, send):
        step = int(path.strip("/"))
        # A newline would end the header, here as at an attacker's server.
        place = f"/{step + 1}" if step < after else target.replace("\r", "").replace("\n", "")
        head = f"HTTP/1.1 302 Found\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n"
        send(head.encode("utf-8", "surrogateescape"))

    public = site(handler)
    internet = FakeInternet({"images.example.org": [PUBLIC]}, {PUBLIC: public})
    limits = FetchLimits(ports=frozenset({80, 443, port}), max_redirects=after + 1)
    start = "http://images.example.org/0"
    # A path is no hostile target: it leads back to the site, like "127.0.0.1:80" or "http:/x".
    targets = [url for url in hostile(port) if "://" in url and url.strip() == url]
    for target in targets if after == 0 else targets[::10]:
        error = refusal(fetch_image_bytes, start, limits, network=internet.network)
        assert error.code in ("url_not_allowed", "url_bad_answer"), target
    assert set(internet.connected) == {f"{PUBLIC} 80"}
    assert canaries.hits() == 0


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://images.example.org/f.png", "data:image/png;base64,AA"]
)
def test_a_redirect_may_not_change_to_another_scheme(location, site):
    error = refusal(fetch, site(answer(status="302 Found", location=location)))
    assert error.code == "url_not_allowed"


def test_a_redirect_is_not_repaired(site):
    """Some parsers drop the tab, and go to another host than others see."""
    location = "http://images.exam\tple.org/"
    error = refusal(fetch, site(answer(status="302 Found", location=location)))
    assert "U+0009" in str(error)


def test_a_redirect_without_a_place(site):
    assert refusal(fetch, site(answer(status="302 Found"))).code == "url_bad_answer"


def test_a_redirect_with_an_international_path(site):
    def handler(path, send):
        send(answer(PICTURE) if "%E5%9B%BE" in path else answer(status="302 x", location="/图.png"))

    assert fetch(site(handler)) == PICTURE


# Time and size


def stream(head, part, *, pause=0.0):
    """Endless: the head, then the same part until nobody listens."""

    def handler(_path, send):
        send(head)
        while True:
            send(part)
            time.sleep(pause)

    return handler


OK = b"HTTP/1.1 200 OK\r\n"
ENDLESS = {
    "body": (OK + b"\r\n", b"x" * 65536),
    "body, huge length": (OK + b"Content-Length: 99999999999\r\n\r\n", b"x" * 65536),
    "chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"),
    "chunk of -1": (OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", b"x" * 65536),
    "huge chunk": (OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffff\r\n", b"x" * 65536),
    "tiny chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 4096),
    "chunk extensions": (OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x" * 65536),
    "trailers": (OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"a: b\r\n" * 4096),
    "header line": (OK + b"X: ", b"x" * 65536),
    "headers": (OK, b"X: y\r\n" * 4096),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 512),
    "no HTTP": (b"", b"\x89PNG" * 16384),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_has_no_end_is_cut(kind, site):
    public = site(stream(*ENDLESS[kind]))
    started = time.monotonic()
    error = refusal(fetch, public, max_bytes=100_000)
    assert error.code in ("url_too_large", "url_bad_answer")
    assert time.monotonic() - started < 5
    public.close()
    assert public.sent < 16 * 2**20  # what buffers of both ends hold, and a little


def test_a_promise_that_is_too_large_is_not_waited_for(site):
    public = site(stream(OK + b"Content-Length: 100001\r\n\r\n", b"", pause=0.05))
    assert refusal(fetch, public, max_bytes=100_000).code == "url_too_large"


@pytest.mark.parametrize("excess", [0, 1])
def test_the_limit_is_exact(excess, site):
    body = bytes(70_000 + excess)
    for head in (OK + b"\r\n", answer(body)[: -len(body)]):
        public = site(head + body)
        if excess:
            assert refusal(fetch, public, max_bytes=70_000).code == "url_too_large"
        else:
            assert fetch(public, max_bytes=70_000) == body


SLOW = {
    "body": (OK + b"Content-Length: 1000\r\n\r\n", b"x"),
    "body without length": (OK + b"\r\n", b"x"),
    "chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "headers": (OK + b"X: ", b"x"),
    "status": (b"", b"H"),
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_trickle_is_cut_at_the_total_time(kind, site):
    """A byte each 50 ms never lets ``read_seconds`` pass; only the total does."""
    started = time.monotonic()
    error = refusal(
        fetch, site(stream(*SLOW[kind], pause=0.05)), read_seconds=0.15, total_seconds=0.25
    )
    assert error.code == "url_timeout"
    assert 0.2 < time.monotonic() - started < 1.5


def test_a_fast_stream_is_cut_at_the_total_time(site):
    public = site(stream(*ENDLESS["continue"]))
    assert refusal(fetch, public, max_bytes=2**40, total_seconds=0.2).code == "url_timeout"


def test_the_total_time_cuts_a_silence_short(site):
    done = threading.Event()
    public = site(lambda _path, _send: done.wait(5))
    started = time.monotonic()
    assert refusal(fetch, public, total_seconds=0.2).code == "url_timeout"
    done.set()
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_silent_server(scheme, site):
    done = threading.Event()
    public = site(lambda _path, _send: done.wait(5))
    started = time.monotonic()
    error = refusal(
        fetch, public, f"{scheme}://images.example.org/", connect_seconds=0.2, read_seconds=0.2
    )
    done.set()
    assert error.code == "url_timeout"
    assert time.monotonic() - started < 1.5


def test_the_total_time_spans_redirects(site):
    def handler(_path, send):
        time.sleep(0.12)
        send(answer(status="302 Found", location="/again"))

    error = refusal(fetch, site(handler), read_seconds=0.25, total_seconds=0.3)
    assert error.code == "url_timeout"


def test_a_slow_name_server(monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(5) and [])
    started = time.monotonic()
    limits = FetchLimits(connect_seconds=0.2)
    error = refusal(fetch_image_bytes, "http://images.example.org/", limits)
    done.set()
    assert error.code == "url_timeout"
    assert time.monotonic() - started < 1


# Answers


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "br", "identity, gzip"])
def test_compressed_content_is_refused(encoding, site):
    error = refusal(fetch, site(answer(b"\x1f\x8b" + bytes(100), content_encoding=encoding)))
    assert error.code == "url_bad_answer"
    assert encoding in str(error)


@pytest.mark.parametrize(
    "broken",
    [
        answer(PICTURE, content_length=str(len(PICTURE) + 1)),
        answer(PICTURE, content_length="-1"),
        answer(PICTURE, content_length="1e3"),
        answer(PICTURE, content_length="+5"),
        answer(PICTURE, content_length="٣"),
        OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n0\r\n\r\n",
        answer(b""),
        answer(b"gone", status="404 Not Found"),
        answer(b"part", status="206 Partial Content"),
        answer(status="204 No Content"),
        answer(status="500 \x1b[31mred"),
        answer(status="101 Switching Protocols"),
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
    ],
)
def test_a_broken_answer(broken, site):
    assert refusal(fetch, site(broken)).code == "url_bad_answer"


def test_nothing_beyond_the_promised_length_is_read(site):
    assert fetch(site(answer(b"image" + b"smuggled", content_length="5"))) == b"image"


@pytest.mark.parametrize("step", [1, 7, 1000, 65536, len(PICTURE)])
def test_the_bytes_are_identical(step, site):
    parts = [PICTURE[start : start + step] for start in range(0, len(PICTURE), step)][:5000]
    body = b"".join(parts)
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    assert fetch(site(OK + b"Transfer-Encoding: Chunked\r\n\r\n" + chunked)) == body
    assert fetch(site(answer(body))) == body
    assert fetch(site(OK + b"\r\n" + body)) == body


def test_the_request(site):
    public = site(answer(PICTURE, set_cookie="a=b"))
    fetch(public, "http://IMAGES.example.ORG.:80/a b.png?q=图#part".replace(" ", "%20"))
    lines = public.requests[0].split("\r\n")
    assert lines[0] == "GET /a%20b.png?q=%E5%9B%BE HTTP/1.1"
    assert sorted(lines[1:-2]) == [
        "Accept-Encoding: identity",
        "Accept: image/*",
        "Connection: close",
        "Host: images.example.org",
        "User-Agent: vlmtune",
    ]
    fetch(public)
    assert "a=b" not in public.requests[1]


# Certificates


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed; it makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=test"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-addext", "subjectAltName=DNS:images.example.org"),
            *("-keyout", "key.pem", "-out", "cert.pem"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture
def secure(certificate, site):
    """A site with a certificate for images.example.org, and the names that it was called by."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    called = []
    context.sni_callback = lambda _socket, name, _context: called.append(name)

    def handler(path, send):
        if path == "/down":
            send(answer(status="302 Found", location="http://images.example.org/"))
        else:
            send(answer(PICTURE))

    return site(handler, tls=context), called


def fetch_securely(certificate, site, url):
    trusted = certificate / "cert.pem"
    internet = FakeInternet(
        {"images.example.org": [PUBLIC], "other.example.org": [PUBLIC]},
        {PUBLIC: site},
        tls=lambda: ssl.create_default_context(cafile=str(trusted)),
    )
    return fetch_image_bytes(url, network=internet.network)


def test_https_asks_for_the_name_and_not_for_the_address(certificate, secure):
    server, called = secure
    assert fetch_securely(certificate, server, "https://images.example.org/f.png") == PICTURE
    assert called == ["images.example.org"]
    assert "Host: images.example.org\r\n" in server.requests[0]


@pytest.mark.parametrize("host", ["other.example.org", PUBLIC])
def test_a_certificate_for_another_name(host, certificate, secure):
    server, _ = secure
    error = refusal(fetch_securely, certificate, server, f"https://{host}/f.png")
    assert error.code == "url_unreachable"
    assert "certificate" in str(error)
    assert server.requests == []


def test_a_certificate_that_nobody_vouches_for(secure):
    server, _ = secure
    error = refusal(fetch, server, "https://images.example.org/f.png")
    assert error.code == "url_unreachable"
    assert "certificate" in str(error)
    assert server.requests == []


def test_https_does_not_fall_back_to_http(certificate, secure):
    server, _ = secure
    error = refusal(fetch_securely, certificate, server, "https://images.example.org/down")
    assert error.code == "url_not_allowed"
    assert "plain http" in str(error)
    assert server.hits == 1


def test_a_server_that_speaks_no_tls(site):
    public = site(answer(PICTURE), greeting=answer(PICTURE))
    assert refusal(fetch, public, "https://images.example.org/").code == "url_unreachable"


# The real look-up and connection


def test_certificates_are_checked():
    context = INTERNET.tls()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


def test_an_unknown_name():
    def unknown(_host, _port, _seconds):
        raise socket.gaierror(-2, "Name or service not known")

    error = refusal(fetch_image_bytes, "http://no.example.org/", network=Network(resolve=unknown))
    assert error.code == "url_unreachable"
    assert "no.example.org" in str(error)


def test_the_real_look_up_is_judged_too(canaries):
    """Through the system's resolver, as a program does: ``localhost`` needs no name server."""
    assert {str(address) for address in resolve("localhost", 80, 5)} <= {"127.0.0.1", "::1"}
    limits = FetchLimits(ports=frozenset({canaries.port}))
    url = f"http://127.0.0.1:{canaries.port}/"
    assert refusal(fetch_image_bytes, url, limits).code == "url_not_allowed"
    assert canaries.hits() == 0


def test_every_address_of_an_answer_is_found(monkeypatch):
    places = [("fe80::1%eth0", 80, 0, 2), ("93.184.215.14", 80), ("93.184.215.14", 80)]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert [str(address) for address in resolve("a.example.org", 80, 5)] == [
        "fe80::1",
        "93.184.215.14",
    ]


# What a URL is taken to mean


PORTS = frozenset({80, 443})


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("HTTP://Example.ORG", "example.org", 80, "/"),
        ("https://example.org?a=1", "example.org", 443, "/?a=1"),
        ("https://example.org./a/../b%20c", "example.org", 443, "/a/../b%20c"),
        ("http://例え。テスト/", "xn--r8jz45g.xn--zckzah", 80, "/"),
        ("http://ＥＸＡＭＰＬＥ．ｏｒｇ/", "example.org", 80, "/"),
        ("http://bücher.example/", "xn--bcher-kva.example", 80, "/"),
        ("http://8.8.8.8/", "8.8.8.8", 80, "/"),
        ("http://8.8.8.8./", "8.8.8.8", 80, "/"),
        ("http://[2606:4700:0:0::1111]:443/", "2606:4700::1111", 443, "/"),
        ("https://medium.com/@someone/a.png", "medium.com", 443, "/@someone/a.png"),
        ("http://a_b.example.org/\"<>'", "a_b.example.org", 80, "/%22%3C%3E'"),
    ],
)
def test_a_url_is_understood(url, host, port, path):
    target = parse(url, PORTS)
    assert (target.host, target.port, target.path) == (host, port, path)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://user:secret@example.org/", "user name or password"),
        ("http://good.example.org\\@example.org/", r"U\+005C"),
        ("http://example.org/a\u200bb", r"U\+200B"),
        ("http://example.org/a\tb", r"U\+0009"),
        ("http://example.org/a b", r"U\+0020"),
        ("http://example.org/" + "a" * 8192, "8,211 characters"),
        ("http://intranet/", "local network"),
        ("http://2130706433/", "unusual spelling"),
        ("http://0x7f.1/", "unusual spelling"),
        ("http://0177.0.0.1/", "unusual spelling"),
        ("http://１２７.１/", "unusual spelling"),
        ("http://straße.example/", "xn--"),
        ("http://[8.8.8.8]/", "no IPv6 address"),
        ("http://example.org:8080/", r"allowed: 80, 443"),
        ("http://ex℀mple.org/", "no valid name"),
        ("http://example.org％2f/", "no valid name"),
        ("ftp://example.org/", "only http"),
    ],
)
def test_a_url_is_refused_before_anything_is_looked_up(url, reason):
    """The address would be judged as well; none of these gets so far."""
    with pytest.raises(FetchError, match=reason):
        parse(url, PORTS)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30) | st.from_regex(r"[a-z0-9.:@%\[\]\\/?#xX-]{0,30}", fullmatch=True))
def test_whatever_is_written_the_host_is_plain(text):
    for url in (f"http://{text}", f"https://{text}/p?q"):
        assert shown(url).isprintable()
        try:
            target = parse(url, PORTS)
        except FetchError:
            continue
        assert set(target.host) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.:")
        assert target.path.isascii()
        assert " " not in target.path
        # What we send is read by others as we read it.
        again = urlsplit(target.url)
        assert (again.hostname, again.username) == (target.host, None)
        assert (again.port or {"http": 80, "https": 443}[again.scheme]) == target.port


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:secret@example.org/a.png", "https://example.org/a.png"),
        ("https://example.org/a.png?X-Amz-Signature=secret", "https://example.org/a.png?…"),
        ("https://example.org/a.png#secret", "https://example.org/a.png"),
        ("https://user:sec/ret@example.org/", "https://…"),
        ("https://good\\user:secret@example.org/", "https://example.org/"),
        ("http:user:secret@example.org/a", "example.org/a"),
        ("user:secret@example.org/?u=http://x", "example.org/"),
        ("http://a\x1b[2J\n\u202e.org", "http://a\\x1b[2J\\n\\u202e.org"),
        ("https://medium.com/@someone/a.png", "https://medium.com/@someone/a.png"),
        ("data:image/png;base64,secret", "data:image/png;base64,… (28 characters)"),
    ],
)
def test_a_url_is_shown_without_credentials(url, expected):
    assert shown(url) == expected


def test_errors_hold_no_credentials(site):
    urls = [
        "https://user:secret@images.example.org/a.png",
        "http://images.example.org/a.png?token=secret",
        "http://user:sec/ret@images.example.org:99999/?secret#secret",
        "ftp://user:secret@images.example.org/secret?secret".replace("/secret?", "/a?"),
    ]
    for url in urls:
        assert "secret" not in str(refusal(fetch, site(answer(status="403 No")), url))


def test_what_is_meant_as_a_url():
    for text in ("http://x/a.png", "FILE:///a", " https://x", "data:image/png;base64,AA", "s3://b"):
        assert is_url(text)
    for text in ("a.png", "/tmp/a.png", "C:\\a.png", "C:/a.png", "a:b.png", "runs/http:/a", ""):
        assert not is_url(text)


def test_printable_keeps_what_people_read():
    assert printable("图 é.png") == "图 é.png"
    for code in itertools.chain(range(32), range(0x7F, 0xA0), range(0x202A, 0x202F)):
        assert printable(chr(code)).isascii()


# data: URLs


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + base64.b64encode(PICTURE).decode(),
        "DATA:image/PNG;charset=x;BASE64," + base64.b64encode(PICTURE).decode(),
        "data:image/png;base64," + base64.b64encode(PICTURE).decode().replace("+", "%2B"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in PICTURE[:512]),
    ],
    ids=["base64", "capitals", "escaped", "percent"],
)
def test_a_data_url(url):
    closed = Network(resolve=pytest.fail, connect=pytest.fail)
    expected = PICTURE if "base64" in url.lower() else PICTURE[:512]
    assert fetch_image_bytes(url, network=closed) == expected
    assert decode_data_url(url, len(expected)) == expected
    assert refusal(decode_data_url, url, len(expected) - 1).code == "url_too_large"


def test_a_huge_data_url_is_not_decoded(monkeypatch):
    monkeypatch.setattr(base64, "b64decode", pytest.fail)
    url = "data:image/png;base64," + "A" * 4_000_000
    assert refusal(decode_data_url, url, 1000).code == "url_too_large"


def test_fetching_loads_nothing_heavy():
    code = "import sys, vlmtune.fetch; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
