"""The real command, in this process: exit status, standard output, standard error."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vlmtune.cli.main import app

OPTIONS = (
    "image.max_pixels=6272",
    "tuning.rank=4",
    "training.precision=fp32",
    "training.max_steps=2",
    "training.batch_size=4",
    "training.workers=0",
    "evaluation.limit=2",
    "evaluation.probe=2",
    "evaluation.max_new_tokens=4",
)


@dataclass(frozen=True)
class Done:
    """What a command did.

    Attributes:
        status: Exit status.
        out: Standard output.
        err: Standard error.
    """

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of standard output, which must be all of it."""
        (line,) = self.out.splitlines()
        value = json.loads(line)
        assert isinstance(value, dict)
        return value

    @property
    def message(self) -> str:
        """The one paragraph of an error."""
        said = [line for line in self.err.splitlines() if line.startswith("vlmtune: ")]
        assert len(said) == 1, self.err
        return said[0].removeprefix("vlmtune: ")


Command = Callable[..., Done]


@pytest.fixture
def command() -> Iterator[Command]:
    """Runs ``vlmtune`` with arguments; a traceback or a foreign exception fails the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*arguments: object, debug: bool = False) -> Done:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        done = Done(result.exit_code, result.stdout, result.stderr)
        assert debug or "Traceback" not in done.out + done.err
        return done

    yield run
    root.handlers[:] = handlers  # the command's own points to a stream that is closed now
    root.setLevel(level)


@pytest.fixture
def train_arguments(tiny_base: Path, tiny_data: Path) -> list[str]:
    """A short run of the shipped recipe ``latex-ocr``."""
    return ["train", "latex-ocr", f"model.base={tiny_base}", f"data.path={tiny_data}", *OPTIONS]
