"""A real server on a loopback address, in a thread of the test's own process."""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vlmtune.data.media import ImagePolicy
from vlmtune.models.encode import Encoder
from vlmtune.serving.engine import Engine
from vlmtune.serving.front import Front
from vlmtune.serving.openai_api import ApiConfig, create_app
from vlmtune.serving.served import Served, ServedModel
from vlmtune.serving.server import make_server
from vlmtune.serving.settings import EngineConfig

POLICY = ImagePolicy(min_pixels=784, max_pixels=7840)
PROMPT = "Read the picture."


@dataclass
class Live:
    """A running server.

    Attributes:
        url: Where it listens.
        engine: What answers.
    """

    url: str
    engine: Front
    clients: list[Any] = field(default_factory=list)

    def client(self, **options: Any) -> Any:
        """The official client, which asks once only."""
        from openai import OpenAI

        options = {"api_key": "none", "max_retries": 0, "timeout": 60.0, **options}
        self.clients.append(OpenAI(base_url=f"{self.url}/v1", **options))
        return self.clients[-1]

    def ask(self, messages: Any, **options: Any) -> Any:
        """A chat completion of the model ``tiny``, by a client that all calls share."""
        client = self.clients[0] if self.clients else self.client()
        return client.chat.completions.create(messages=messages, **{"model": "tiny", **options})

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def idle(self, seconds: float = 5.0) -> bool:
        """Whether nothing runs or waits any more within so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not (self.engine.running or self.engine.waiting):
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def serving(
    served: Served, api: ApiConfig | None = None, engine: EngineConfig | None = None
) -> Iterator[Live]:
    """A server in a thread of its own."""
    with answering(Engine(served, engine), api) as running:
        yield running


@contextlib.contextmanager
def answering(answering: Front, api: ApiConfig | None = None) -> Iterator[Live]:
    """The same with any engine, which is started here and stopped."""
    api = api or ApiConfig()
    answering.start()
    urls: list[str] = []
    server = make_server(create_app(answering, api), "127.0.0.1", 0, api.limits, urls.append)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    while not urls and thread.is_alive():
        time.sleep(0.005)
    try:
        running = Live(urls[0], answering)
        yield running
        for client in running.clients:
            client.close()
    finally:
        server.should_exit = True
        thread.join()
        answering.stop()


def plain(model: Any, encoder: Encoder, name: str = "m") -> Served:
    """A model under one name."""
    return Served(model, None, {name: ServedModel(name, encoder, None)})


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def shown(data: bytes, kind: str = "png") -> dict[str, Any]:
    """A part of a message that holds a picture."""
    return {"type": "image_url", "image_url": {"url": data_url(data, kind)}}


def said(text: str) -> dict[str, Any]:
    """A part of a message that holds a text."""
    return {"type": "text", "text": text}


def user(*parts: Any) -> list[dict[str, Any]]:
    """Messages of one user's turn; of a text alone, as most clients send it."""
    return [{"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}]
