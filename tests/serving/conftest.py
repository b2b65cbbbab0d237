"""A tiny model with a lot to say, and engines on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from live_server import POLICY, PROMPT, Live, serving
from tiny_rows import encoder_of, lively
from vlmtune.serving.engine import Engine
from vlmtune.serving.served import Served, open_served
from vlmtune.serving.settings import EngineConfig
from vlmtune.testing import tiny

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model, so to speak: weights whose answers differ, and a contract. Read only."""
    out = tiny("qwen2_vl", tmp_path_factory.mktemp("served") / "tiny", seed=3)
    lively(out).save_pretrained(out)
    encoder_of(out, POLICY, prompt=PROMPT).contract.write(out)
    return out


@pytest.fixture(scope="session")
def served(folder: Path) -> Served:
    return open_served(folder)


@pytest.fixture
def make_engine(served: Served) -> Iterator[MakeEngine]:
    """Started engines that end with the test."""
    made: list[Engine] = []

    def make(other: Served | None = None, **config: Any) -> Engine:
        engine = Engine(other or served, EngineConfig(**config))
        made.append(engine)
        engine.start()
        return engine

    yield make
    for engine in made:
        engine.stop()


@pytest.fixture(scope="module")
def live(served: Served) -> Iterator[Live]:
    with serving(served) as running:
        yield running
