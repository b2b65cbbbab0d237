"""A ``vllm serve`` of our own: started, waited for, ended."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmtune.config import Config
from vlmtune.errors import ModelError, UsageError
from vlmtune.serving.vllm import keeper

logger = logging.getLogger("vlmtune.serving.vllm")

KNOWN = "0.33"  # the version whose interface this was written against
PROGRAM = "vllm"
PROBED = 2  # images of the largest question that it is asked before it serves
TAIL = 25  # lines of its log that an error shows
START_SECONDS = 1800.0  # loading, compiling and measuring a large model
# It would tell its makers that it is used, and look for models on hubs; and it lives in an
# environment of its own, which ours must not reach into.
SETTING = (
    "env",
    "--unset=PYTHONPATH",
    "--unset=PYTHONHOME",
    "VLLM_NO_USAGE_STATS=1",
    "DO_NOT_TRACK=1",
    "HF_HUB_OFFLINE=1",
)


class VllmConfig(Config):
    """Which vLLM computes.

    Attributes:
        program: The command: a name on the path, or where it is.
        options: A YAML file of further options of ``vllm serve``, e.g. memory and devices.
    """

    program: str = PROGRAM
    options: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How vLLM is started.

    Attributes:
        program: The command, found on the path or where it says.
        folder: The model.
        rows: Most answers at once.
        images: Most images of a question.
        dtype: Of the weights; None takes the folder's.
        config: A YAML file of further options of ``vllm serve``, or None.
        seconds: Longest time until it answers.
    """

    program: str = PROGRAM
    folder: Path
    rows: int
    images: int
    dtype: str | None = None
    config: Path | None = None
    seconds: float = START_SECONDS

    def command(self, socket: Path) -> list[str]:
        """The words that start it. Everything that decides what the model sees is ours to say."""
        command = [self.program, "serve", str(self.folder.resolve()), "--uds", str(socket)]
        command += ["--served-model-name", "model"]
        command += ["--enable-scale-out"]  # tokens in, tokens out
        command += ["--generation-config", "vllm"]  # no sampling defaults of the folder's
        command += ["--allowed-media-domains", "none.invalid"]  # it opens no address
        command += ["--limit-mm-per-prompt", json.dumps({"image": max(self.images, PROBED)})]
        command += ["--max-num-seqs", str(self.rows)]
        command += ["--disable-uvicorn-access-log"]
        command += ["--dtype", self.dtype] if self.dtype else []
        command += ["--config", str(self.config.resolve())] if self.config else []
        return command


def find_program(program: str) -> str:
    """Where vLLM is.

    Raises:
        UsageError: If it is nowhere.
    """
    found = shutil.which(program)
    if found is None:
        raise UsageError(
            f"--engine vllm: there is no program {program!r}. vLLM needs other versions of "
            "transformers and torch than vlmtune, so install it in an environment of its own "
            "(python -m venv vllm-env, then vllm-env/bin/pip install vllm), and name it with "
            "--vllm vllm-env/bin/vllm; or leave --engine out"
        )
    return str(Path(found).absolute())


class Process:
    """A running ``vllm serve``, reached over a socket that only this user can open.

    Args:
        launch: How it is started.

    Attributes:
        socket: Where it listens.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._folder = tempfile.TemporaryDirectory(prefix="vlmtune-vllm-")  # mode 0700
        self.socket = Path(self._folder.name) / "socket"
        command = [*SETTING, *launch.command(self.socket)]
        logger.info("starting %s", " ".join(command[len(SETTING) :]))
        self._process = subprocess.Popen(
            [sys.executable, str(Path(keeper.__file__)), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._tail: deque[str] = deque(maxlen=TAIL)
        self._reader = threading.Thread(target=self._read, name="vllm log", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def wait(self, answers: Callable[[], bool]) -> None:
        """Wait until it answers.

        Args:
            answers: Whether it does.

        Raises:
            ModelError: With the end of its log, if it ends instead, or takes too long.
        """
        end = time.monotonic() + self._launch.seconds
        while not (self.socket.exists() and answers()):
            if not self.alive:
                self._reader.join(5.0)
                raise ModelError(
                    f"vLLM ended with status {self._process.returncode} before it answered "
                    f"(vlmtune knows the options of vLLM {KNOWN}). The end of its log:\n{self.tail}"
                )
            if time.monotonic() > end:
                raise ModelError(
                    f"vLLM did not answer within {self._launch.seconds:g} s. The end of its log:\n"
                    f"{self.tail}"
                )
            time.sleep(0.1)

    @property
    def tail(self) -> str:
        """The last lines that it wrote."""
        return "\n".join(list(self._tail))

    def stop(self) -> None:
        """End it, with everything that it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(2 * keeper.PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(5.0)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._folder.cleanup()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.decode("utf-8", "replace").rstrip()
            self._tail.append(text)
            logger.info("vllm: %s", text)


def check_config(path: Path, keys: Sequence[str]) -> None:
    """That a file of options leaves alone what decides what the model sees.

    Args:
        path: The YAML file of ``--vllm-config``.
        keys: Options that it may not have, spelled with hyphens.

    Raises:
        UsageError: If it cannot be read, or has one of them.
    """
    import yaml

    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--vllm-config: {path} cannot be read: {error}") from None
    if not isinstance(options, dict):
        raise UsageError(f"--vllm-config: {path} is no table of options of `vllm serve`")
    for name in options:
        if str(name).replace("_", "-").lstrip("-") in keys:
            raise UsageError(
                f"--vllm-config: {name} is not taken: it would change what the model sees or who "
                "may ask it, and vlmtune answers for that; leave it out"
            )
