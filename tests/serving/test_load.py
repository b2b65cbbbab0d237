"""The real command under load: nothing lost, nothing mixed, nothing kept."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest

from live_server import said, shown, user
from tiny_rows import asked, picture
from vlmtune.models.generate import generate
from vlmtune.serving.limits import MIB

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

VLMTUNE = Path(sys.executable).with_name("vlmtune")
REQUESTS, AT_ONCE, TOKENS = 1000, 64, 8


class Server:
    """``vlmtune serve`` in a process of its own."""

    def __init__(self, folder: Path, log: Path, *options: str) -> None:
        self.log = log
        command = [VLMTUNE, "serve", folder, "--port", "0", "--json"]
        with log.open("wb") as err:
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=subprocess.PIPE,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self.process.stdout is not None
        line = json.loads(self.process.stdout.readline())
        self.url: str = line["url"]
        self.port = int(self.url.rpartition(":")[2])
        self.seen = psutil.Process(self.process.pid)

    def client(self, **options) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 120.0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def health(self) -> dict[str, object]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return dict(json.loads(connection.getresponse().read()))

    def settle(self, seconds: float = 10.0) -> tuple[int, int]:
        """Threads and open files once nothing runs and idle connections are closed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            health = self.health()
            if health["running"] == health["waiting"] == 0 and len(self.connections()) <= 1:
                break
            time.sleep(0.1)
        return self.seen.num_threads(), self.seen.num_fds()

    def connections(self) -> list[object]:
        return [each for each in self.seen.net_connections("tcp") if each.status == "ESTABLISHED"]

    def end(self, sign: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sign)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[Server]:
    running = Server(folder, tmp_path_factory.mktemp("log") / "log", "--max-body-mb", "16")
    yield running
    assert running.end() == 0
    text = running.log.read_text(encoding="utf-8")
    assert "Traceback" not in text
    assert not [line for line in text.splitlines() if not line.startswith("INFO: req-")]


def nonces(count: int) -> list[tuple[str, bytes | None]]:
    """Distinct questions, a third with a picture."""
    return [
        (f"Nonce {number * 7919 % 10007}: what is this?" + " and this?" * (number % 5),
         picture((40 + number % 50, 30 + number % 70), seed=number).data if number % 3 == 0
         else None)
        for number in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(served):
    """What each question is answered by itself."""
    from vlmtune.data.conversation import EncodedImage

    rows = [
        asked(text, "x", *([EncodedImage(image)] if image else [])).prompt()
        for text, image in nonces(REQUESTS)
    ]
    encoder = served.first.encoder
    answers = generate(served.model, encoder, rows, max_new_tokens=TOKENS)
    alone = generate(served.model, encoder, rows[::25], max_new_tokens=TOKENS, batch_rows=1)
    assert alone == answers[::25]
    assert len({answer.text for answer in answers}) > 0.9 * REQUESTS
    return answers


def ask_all(server: Server, count: int = REQUESTS) -> list[tuple[str, int, int]]:
    """Every question once, 64 at a time; half of them streamed."""
    with server.client() as client, ThreadPoolExecutor(AT_ONCE) as pool:

        def one(numbered):
            number, (text, image) = numbered
            content = user(*([shown(image)] if image else []), said(text))
            options = {"model": "tiny", "max_tokens": TOKENS, "messages": content}
            if number % 2:
                answer = client.chat.completions.create(**options)
                told = answer.choices[0].message.content
                return told, answer.usage.prompt_tokens, answer.usage.completion_tokens
            counted = {"stream": True, "stream_options": {"include_usage": True}}
            *chunks, last = client.chat.completions.create(**options, **counted)
            told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            return told, last.usage.prompt_tokens, last.usage.completion_tokens

        return list(pool.map(one, enumerate(nonces(count))))


def test_a_thousand_requests(server, expected):
    """None lost, none mixed, equal to one at a time; memory, threads and files as before."""
    ask_all(server)  # warm: pools, allocators, connections
    before, resident = server.settle(), server.seen.memory_info().rss
    found = ask_all(server)
    assert found == [
        (answer.text, answer.prompt_tokens, answer.completion_tokens) for answer in expected
    ]
    after = server.settle()
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    grown = server.seen.memory_info().rss - resident
    assert grown < 0.01 * resident, f"{grown / MIB:.1f} MiB of {resident / MIB:.0f}"


def test_two_hundred_leave(server):
    """Half a second after asking, in the middle of their answers and in the queue."""
    quiet = server.settle()
    with server.client() as client:

        def leave(number):
            stream = client.chat.completions.create(
                model="tiny", messages=user(f"Nonce {number}"), max_tokens=20_000, stream=True
            )
            deadline = time.monotonic() + 0.5
            for _ in stream:
                if time.monotonic() > deadline:
                    break
            stream.close()

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(leave, range(200)))
        started = time.monotonic()
        answer = client.chat.completions.create(model="tiny", messages=user("Hi"), max_tokens=4)
        assert answer.choices
        assert time.monotonic() - started < 5
    while server.health()["running"]:
        assert time.monotonic() - started < 5
    after = server.settle()
    assert after[1] <= quiet[1]


def test_a_reset_without_a_word(server):
    """Connections cut while the answer is awaited, not streamed."""
    body = json.dumps({"model": "tiny", "max_tokens": 20_000, "messages": user("Hi")}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            place = ("127.0.0.1", server.port)
            stack.enter_context(socket.create_connection(place)).sendall(head + body)
        while server.health()["running"] != 20:
            time.sleep(0.01)
    end = time.monotonic() + 5
    while time.monotonic() < end:
        health = server.health()
        if health["running"] == health["waiting"] == 0:
            return
        time.sleep(0.05)
    pytest.fail(f"still busy: {server.health()}")


def latency(client: openai.OpenAI, count: int = 40) -> float:
    """The time that nineteen of twenty healthy requests take at most."""
    taken = []
    for number in range(count):
        started = time.perf_counter()
        client.chat.completions.create(
            model="tiny", messages=user(f"Nonce {number}"), max_tokens=TOKENS
        )
        taken.append(time.perf_counter() - started)
    return statistics.quantiles(taken, n=20)[-1]


def test_slow_clients_do_not_stall_others(server):
    """200 of them: a byte a second of headers, of a body, and streams that nobody reads."""
    body = json.dumps(
        {"model": "tiny", "max_tokens": 50, "stream": True, "messages": user("Hi")}
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()
    over = threading.Event()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(server.client())
        latency(client)
        baseline = min(latency(client) for _ in range(2))
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            for _ in range(200)
        ]
        sent = [head[:20], head + body[:10], head + body]
        for number, connection in enumerate(slow):
            connection.sendall(sent[number % 3])

        def drip():
            while not over.wait(1.0):
                for number, connection in enumerate(slow):
                    if number % 3 < 2:
                        with contextlib.suppress(OSError):
                            connection.sendall(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            time.sleep(2)
            beside = min(latency(client) for _ in range(2))
        finally:
            over.set()
            dripping.join()
        assert beside < 2 * baseline + 0.05, (beside, baseline)


@pytest.mark.parametrize("told", [True, False], ids=["content-length", "chunked"])
def test_memory_of_a_body_that_is_too_large(server, told):
    """Ten times the limit: read up to the limit, and no further."""
    limit = 16 * MIB
    ask_all(server, 20)
    before, peak, over = server.seen.memory_info().rss, [0], threading.Event()

    def watch():
        while not over.wait(0.005):
            peak[0] = max(peak[0], server.seen.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    with contextlib.closing(connection):
        pieces = (b" " * MIB for _ in range(160))
        headers = {"content-type": "application/json"}
        headers |= {"content-length": str(160 * MIB)} if told else {"transfer-encoding": "chunked"}
        with contextlib.suppress(OSError):  # it may stop reading
            connection.request(
                "POST", "/v1/chat/completions", pieces, headers, encode_chunked=not told
            )
        assert connection.getresponse().status == 413
    over.set()
    watching.join()
    assert peak[0] - before < 2 * limit


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish(folder, tmp_path, sign):
    server = Server(folder, tmp_path / "log")
    with server.client() as client:
        stream = client.chat.completions.create(
            model="tiny", messages=user("Hi"), max_tokens=300, stream=True
        )
        chunks = iter(stream)
        next(chunks)
        server.process.send_signal(sign)
        rest = list(chunks)
        assert rest[-1].choices[0].finish_reason in ("length", "stop")
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    assert server.end() == 0
    assert "Traceback" not in server.log.read_text(encoding="utf-8")


def test_a_port_that_is_taken(server, folder):
    command = [VLMTUNE, "serve", folder, "--json"]
    done = subprocess.run(
        [*command, "--port", str(server.port)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "usage"
    assert "--port" in done.stderr
