"""What a verb prints: one JSON object or lines for people, and errors as one clear paragraph."""

from __future__ import annotations

import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from vlmtune.errors import VlmtuneError

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and libraries' warnings.")]

NOISY = ("httpx", "huggingface_hub", "transformers", "datasets", "peft", "bitsandbytes")


def say(text: str) -> None:
    """A line for people, on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def finish(result: Mapping[str, Any], *, as_json: bool, lines: Sequence[str]) -> None:
    """Print a verb's result on standard output.

    Args:
        result: The keys that the design promises.
        as_json: Whether to print them as one JSON object.
        lines: What people read instead.
    """
    text = json.dumps(result, ensure_ascii=False, allow_nan=False) if as_json else "\n".join(lines)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class _Lines(logging.Handler):
    """Log records as lines on whatever standard error is when they come."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        say(self.format(record))


def listening(*, debug: bool, quiet: bool = False) -> None:
    """Show log records on standard error, and libraries' warnings only where they are asked for.

    Args:
        debug: Whether they are.
        quiet: Show nothing below an error: another process speaks.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[_Lines()], force=True)
    if quiet:
        logging.getLogger().setLevel(logging.ERROR)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.ERROR)
    if not debug:
        warnings.simplefilter("ignore")


@contextmanager
def errors(*, as_json: bool, debug: bool) -> Iterator[None]:
    """Turn errors into one paragraph and the exit status that they carry."""
    listening(debug=debug)
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise  # a verb's own exit status; typer makes these RuntimeErrors
    except VlmtuneError as error:
        _fail(error, error.code, error.exit_status, as_json, debug)
    except KeyboardInterrupt as error:
        _fail(error, "interrupted", 130, as_json, debug)
    except (MemoryError, OSError, RuntimeError) as error:
        # A full disk, a missing right, no memory: the user's to mend, though not of our tree.
        _fail(error, "failed", 1, as_json, debug)


def _fail(error: BaseException, code: str, status: int, as_json: bool, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    message = str(error) or code
    if not isinstance(error, VlmtuneError | KeyboardInterrupt):
        message = f"{type(error).__name__}: {message} (--debug shows where)"
    say(f"vlmtune: {message}")
    if as_json:
        finish({"error": {"code": code, "message": message}}, as_json=True, lines=())
    raise typer.Exit(status) from None
