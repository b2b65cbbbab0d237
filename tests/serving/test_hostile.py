"""What an attacker sends: refused within a second, nothing reached, nothing told."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import socket
import struct
import threading
import time
import zlib

import pytest
from PIL import Image as Pictures

from live_server import Live, data_url, said, serving, shown, user
from test_fetch import hostile
from tiny_rows import picture
from vlmtune.serving.limits import MIB, Limits
from vlmtune.serving.openai_api import ApiConfig
from websites import Canaries, FakeInternet, Site, answer, closing_all

PUBLIC = "93.184.216.34"
# Addresses in memory, files and code of this machine.
TELLING = re.compile(
    r"0x[0-9a-f]{6,}|Traceback|File \"|\.py\b|/(work|tmp|root|home|usr|opt|var)/|<_io\."
)
SMALL = Limits(max_body_bytes=MIB, max_image_bytes=MIB // 2, max_images=4, header_seconds=2.0)
PICTURE = picture().data


@pytest.fixture(scope="module")
def strict(served):
    with serving(served, ApiConfig(limits=SMALL)) as live:
        yield live


def posted(live: Live, body: bytes | str, own: str = "", **headers: str) -> tuple[int, str, float]:
    """Status, text and seconds of a request; but for ``own``, nothing telling is in it."""
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=10)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json", **headers}
        body = body.encode() if isinstance(body, str) else body
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        text = response.read().decode()
    seconds = time.perf_counter() - started
    assert not TELLING.search(text.replace(own, "")), text
    if response.status != 200:
        error = json.loads(text)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert len(error["message"]) < 1000
    return response.status, text, seconds


def asked(messages, **options):
    return json.dumps({"model": "tiny", "max_tokens": 4, "messages": messages, **options})


def refused(live, body, status=400, own="", **headers):
    found, text, seconds = posted(live, body, own, **headers)
    assert found == status, text[:300]
    assert seconds < 1, text[:300]
    return json.loads(text)["error"]


def alive(live):
    assert posted(live, asked(user("Hi")))[0] == 200


# Bodies


def test_bodies(strict):
    deep = "[" * 10_000 + "]" * 10_000
    for body in (
        "", "null", "[]", "{", '{"model": "tiny"}', b"\xff\xfe\xfa", b"\x00" * 100,
        asked(user("Hi"))[:-1], asked("no list"), asked([[]]), asked([None]),
        '{"messages": ' + deep + "}", '{"model": "tiny", "messages": [{"content": ' + deep + "}]}",
        '{"a":' * 10_000 + "1" + "}" * 10_000, "[" * 100_000,
        asked(user("Hi") * 10_000), asked(user("Hi"), n=10**9), asked(user("Hi"), max_tokens=10**9),
        asked(user("Hi"), seed=10**30), asked(user("Hi"))[:-1] + ', "n": ' + "9" * 5000 + "}",
        asked(user("Hi"), temperature=float("nan")), asked(user("Hi"), top_p=float("inf")),
        asked(user("Hi")).replace("}]", '}], "temperature": 1e999', 1),
        asked(user("Hi")).replace("}]", '}], "temperature": -Infinity', 1),
        asked(user("\ud800 half")), asked(user(said("\udfff"))), asked(user("Hi"), **{"\ud800": 1}),
        asked(user("Hi"), model="\udc80"), asked(user("Hi"), model=["tiny"]),
        asked(user("Hi"), stop=["x"] * 1000), asked(user("Hi"), stop="\ud83d"),
        asked(user(*[shown(PICTURE)] * 1000)[:1])[: MIB - 1], asked(user(*[shown(b"x")] * 1000)),
        asked(user("Hi"), **{"x" * 100_000: 1}), asked(user("Hi"), logit_bias={"5": 100}),
        asked([{"role": "x" * 100_000, "content": "Hi"}]),
        asked(user({"type": "x" * 100_000})),
        '{"model": "tiny", "messages": [' + ",".join("[]" for _ in range(300_000)) + "]}",
    ):  # fmt: skip
        found, text, seconds = posted(strict, body)
        assert found in (400, 404), (body[:80], text[:200])
        assert seconds < 1
    alive(strict)


def test_control_characters_are_text(strict):
    """They are nobody's business but the tokenizer's."""
    assert posted(strict, asked(user("a\x00b\x1b[31m\x7f\u202e")))[0] == 200


def test_too_much(strict):
    """Counted while it is read, whether or not its length is told."""
    large = asked(user("x" * (10 * MIB)))
    error = refused(strict, large, 413)
    assert error["code"] == "request_too_large"
    assert refused(strict, b"", 413, **{"content-length": str(10**15)})["code"]

    def pieces():
        for _ in range(160):
            yield b" " * 65536

    connection = http.client.HTTPConnection("127.0.0.1", strict.port, timeout=10)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json", "transfer-encoding": "chunked"}
        connection.request("POST", "/v1/chat/completions", pieces(), headers, encode_chunked=True)
        assert connection.getresponse().status == 413
    error = refused(strict, asked(user(*[said("x" * 100_000)] * 5 + [said("y" * 550_000)])), 413)
    assert error["code"] == "request_too_large"
    alive(strict)


def test_other_forms(strict):
    body = asked(user("Hi"))
    for headers in (
        {"content-type": "text/plain"},  # what a web page may send without asking
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": ""},
        {"content-encoding": "gzip"},
        {"content-encoding": "deflate, br"},
    ):
        assert refused(strict, body, 415, **headers)["code"] == "unsupported_media_type"
    assert posted(strict, body, **{"content-type": "application/json; charset=utf-8"})[0] == 200


def test_what_is_no_http(strict):
    for data in (b"\x16\x03\x01\x02\x00" * 100, b"GET / HTTP/x\r\n\r\n", b"\r\n" * 5000,
                 b"POST /v1/chat/completions HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
                 b"GET /" + b"a" * 200_000):  # fmt: skip
        with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                said_back = connection.recv(65536)
                assert said_back.startswith(b"HTTP/1.1 4") or not said_back
    alive(strict)


# Pictures


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encoded(image: Pictures.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def bombs() -> dict[str, tuple[str, bytes]]:
    """Small files that become large, or take long."""
    head = b"\x89PNG\r\n\x1a\n"
    zeros = zlib.compress(b"\0" * 60_000_000, 9)
    plain = encoded(Pictures.new("L", (30, 30)), "PNG")
    frames = [Pictures.new("P", (1, 1), number % 2) for number in range(1500)]
    many = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], optimize=False)
    return {
        "png-9000": ("png", encoded(Pictures.new("1", (9000, 9000)), "PNG")),
        "png-20000": ("png", head + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2,
                      0, 0, 0)) + png_chunk(b"IDAT", zeros) + png_chunk(b"IEND", b"")),
        "png-overflow": ("png", head + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1,
                         2**31 - 1, 16, 6, 0, 0, 0)) + png_chunk(b"IEND", b"")),
        "png-text": ("png", plain[:33] + png_chunk(b"zTXt", b"k\0\0" + zeros) + plain[33:]),
        "png-profile": ("png", plain[:33] + png_chunk(b"iCCP", b"k\0\0" + zeros) + plain[33:]),
        "gif-frames": ("gif", many),
        "gif-canvas": ("gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + many[13:]),
        "bmp": ("bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60000, 60000, 1,
                24, 0, 0, 0, 0, 0, 0)),
        "thin": ("png", encoded(Pictures.new("L", (30000, 1)), "PNG")),
        "tiff-bombs": ("tiff", encoded(Pictures.new("1", (9000, 9000)), "TIFF",
                       compression="group4")),
        "webp": ("webp", b"RIFF" + struct.pack("<I", 40) + b"WEBPVP8X" + struct.pack("<I", 10)
                 + b"\x10\0\0\0" + b"\xff\xff\xff" * 2 + b"\0" * 20),
        "text": ("png", b"hello"),
        "html": ("png", b"<html><img src=x onerror=alert(1)>"),
        "svg": ("png", b"<svg><image href='file:///etc/passwd'/></svg>"),
        "eps": ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n"),
        "cut": ("png", PICTURE[: len(PICTURE) // 2]),
        "empty": ("png", b""),
    }  # fmt: skip


def test_bombs(live):
    import psutil

    alive(live)
    before = psutil.Process().memory_info().rss
    for name, (kind, data) in bombs().items():
        found, text, seconds = posted(live, asked(user(shown(data, kind), said("What?"))))
        # Of an animation and beside a large text, the picture itself is harmless.
        assert found == 400 or (found == 200 and name == "gif-frames"), (name, found, text[:200])
        assert seconds < 1, name
        assert psutil.Process().memory_info().rss - before < 512 * MIB, name
    alive(live)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,iVBO!Rw==", "data:image/png;base64,abc", "data:image/png;base64,",
        "data:image/png", "data:text/html;base64,PGI+", "data:,x", "data:image/png,\u00e9",
        "data:image/png;base64," + "A" * 700_000, "DATA:IMAGE/PNG;BASE64,====",
    ],
    ids=lambda url: url[:30],
)  # fmt: skip
def test_data_urls(strict, url):
    part = {"type": "image_url", "image_url": {"url": url}}
    status = 413 if len(url) > 600_000 else 400
    error = refused(strict, asked(user(part, said("What?"))), status)
    assert error["param"] == "messages[0].content[0].image_url.url"


# Addresses


@pytest.fixture
def canaries():
    found = Canaries()
    with closing_all(found):
        yield found


def by_url(url):
    return asked(user({"type": "image_url", "image_url": {"url": url}}, said("What?")))


@pytest.mark.parametrize("domains", [(), ("example.org",), ("*",)], ids=str)
def test_no_hostile_url_reaches_anything(served, canaries, domains):
    internet = FakeInternet()
    config = ApiConfig(domains=frozenset(domains), network=internet.network)
    urls = [url for url in hostile(canaries.port) if not url.startswith("data:")]
    assert len(urls) >= 200
    with serving(served, config) as live:
        for url in urls:
            host = re.search("0x[0-9a-f]{6,}", url, re.IGNORECASE)  # the URL itself is named
            error = refused(live, by_url(url), own=host[0] if host else "")
            assert error["code"] in ("url_not_allowed", "invalid_request"), url
    assert internet.connected == []
    assert canaries.hits() == 0
    if domains != ("*",):  # not even a name is looked up for a stranger
        assert all(name.endswith("example.org") for name in internet.looked_up)


def test_an_allowed_domain_is_fetched(served, canaries):
    good = Site(lambda path, send: send(redirects.get(path) or answer(PICTURE)))
    redirects = {
        "/there": answer(status="302 Found", location="http://other.example.net/f.png"),
        "/here": answer(status="302 Found", location="http://cdn.example.org/f.png"),
        "/inside": answer(status="302 Found", location=f"http://127.0.0.1:{canaries.port}/"),
        "/none": answer(status="404 Not Found"),
    }
    names = {
        "example.org": [PUBLIC], "cdn.example.org": [PUBLIC], "other.example.net": [PUBLIC],
        "rebinding.example.org": [[PUBLIC], ["127.0.0.1"]], "inside.example.org": ["10.0.0.1"],
        "notexample.org": [PUBLIC],
    }  # fmt: skip
    internet = FakeInternet(names, {PUBLIC: good})
    config = ApiConfig(domains=frozenset({"example.org"}), network=internet.network)
    with closing_all(good), serving(served, config) as live:
        held = posted(live, asked(user(shown(PICTURE), said("What?"))))[1]
        expected = json.loads(held)["choices"]
        for url in ("http://example.org/f.png", "http://cdn.example.org/f.png",
                    "HTTP://EXAMPLE.org./f.png", "http://example.org/here"):  # fmt: skip
            status, text, _ = posted(live, by_url(url))
            assert (status, json.loads(text)["choices"]) == (200, expected), url
        hits = good.hits
        for url in ("http://other.example.net/f.png", "http://notexample.org/f.png",
                    "http://example.org.evil.net/", "http://inside.example.org/f.png"):  # fmt: skip
            assert refused(live, by_url(url))["code"] == "url_not_allowed", url
        assert good.hits == hits
        for path in ("there", "inside"):
            url = f"http://example.org/{path}"
            assert refused(live, by_url(url))["code"] == "url_not_allowed"
        assert refused(live, by_url("http://example.org/none"))["code"] == "url_bad_answer"
        several = user(*[{"type": "image_url", "image_url": {"url": u}} for u in (
            "http://example.org/a.png", data_url(PICTURE), "http://cdn.example.org/b.png")],
            said("What?"))  # fmt: skip
        fetched = json.loads(posted(live, asked(several))[1])
        same = json.loads(posted(live, asked(user(*[shown(PICTURE)] * 3, said("What?"))))[1])
        assert fetched["choices"] == same["choices"]
    assert canaries.hits() == 0


def test_a_long_text_lets_others_be_answered(served):
    """Its tokens are made without holding up the threads that speak and listen."""
    encoder, longest = served.first.encoder, [0.0]
    text = "what is this? " * 70_000
    over = threading.Event()

    def watch():
        last = time.perf_counter()
        while not over.wait(0.005):
            now = time.perf_counter()
            longest[0], last = max(longest[0], now - last), now

    watching = threading.Thread(target=watch)
    watching.start()
    started = time.perf_counter()
    ids = encoder.text_ids(text)
    seconds = time.perf_counter() - started
    over.set()
    watching.join()
    assert longest[0] < 0.5 * seconds
    assert ids[:1000] == encoder.text_ids(text[:9000])[:1000]


def test_shapes_that_strangers_choose_are_not_kept_for_ever(served, monkeypatch):
    from vlmtune.models import skeleton

    monkeypatch.setattr(skeleton, "MOST_SHAPES", 20)
    template = served.first.encoder._template
    template._cache.clear()
    with serving(served) as live:
        for turns in range(1, 30):
            messages = [*user("Hi"), {"role": "assistant", "content": "x"}] * turns + user("?")
            assert posted(live, asked(messages))[0] == 200
            assert len(template._cache) <= 20


def test_waiting_bodies_are_bounded_together(served):
    """Images wait with their questions: all together may hold so much and no more."""
    limits = Limits(max_body_bytes=MIB, max_pending_bytes=MIB + MIB // 2)
    large = asked(user(said(" " * 900_000)))  # which is nothing, and refused before the tokenizer
    with serving(served, ApiConfig(limits=limits)) as live:
        for _ in range(4):  # one after the other they are let go
            assert posted(live, large)[0] == 400
        with socket.create_connection(("127.0.0.1", live.port)) as half:
            head = f"content-type: application/json\r\ncontent-length: {len(large)}"
            half.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n".encode()
            )
            half.sendall(large[:-10].encode())
            time.sleep(0.3)
            assert refused(live, large, 429)["code"] == "queue_full"
        time.sleep(0.3)
        assert posted(live, large)[0] == 400


def test_connections_that_say_nothing_are_closed(strict):
    """A byte now and then does not keep one open either."""
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", strict.port), timeout=10))
            for _ in range(20)
        ]
        started = time.monotonic()
        for connection in silent[:10]:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
        while time.monotonic() - started < 1.0:
            for connection in silent[:10]:
                connection.sendall(b"a")
            time.sleep(0.2)
        alive(strict)
        for connection in silent:
            assert connection.recv(100) == b""
        assert 1.5 < time.monotonic() - started < 4
