"""One process of several that train together: ``vlmtune train --devices N`` starts them.

The first shows progress; none prints results or errors: they are left for the process that waits.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmtune.cli.output import listening
from vlmtune.errors import VlmtuneError
from vlmtune.garbage import without_collecting
from vlmtune.training.distributed.launcher import Outcomes, end_with


def main() -> None:
    """Train; the argument is the folder of the launch."""
    end_with(os.getppid())
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    options = json.loads((folder / "options.json").read_text(encoding="utf-8"))
    debug = options.pop("debug")
    listening(debug=debug, quiet=rank > 0)
    outcomes = Outcomes(folder)
    with left(outcomes, rank, debug=debug):
        from vlmtune.cli.progress import observing
        from vlmtune.recipe import load_recipe

        with without_collecting():
            from vlmtune.verbs.train import train

        recipe = load_recipe(folder / "recipe.yaml")
        if rank > 0:
            train(recipe, **options)
        else:
            with observing(recipe.training.log_steps) as observer:
                outcomes.returned(train(recipe, observer=observer, **options))


@contextmanager
def left(outcomes: Outcomes, rank: int, *, debug: bool) -> Iterator[None]:
    """Leave an error where the launcher finds it, and end with its status."""
    try:
        yield
        return
    except BaseException as error:  # noqa: BLE001 - whatever it is, one paragraph says it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is leaving
        status = _told(outcomes, rank, error)
        if debug:
            traceback.print_exc()
    logging.shutdown()
    sys.stderr.flush()
    # At once: closing connections that a dead process holds the other end of takes minutes.
    os._exit(status)


def _told(outcomes: Outcomes, rank: int, error: BaseException) -> int:
    """Write an error down; returns the exit status that it stands for."""
    if isinstance(error, VlmtuneError):
        outcomes.failed(rank, error.code, str(error), error.exit_status, ours=True)
        return error.exit_status
    if isinstance(error, KeyboardInterrupt):
        outcomes.failed(rank, "interrupted", "interrupted", 130, ours=True)
        return 130
    said = f"{type(error).__name__}: {error} (--debug shows where)"
    outcomes.failed(rank, "failed", said, 1, ours=False)
    return 1


if __name__ == "__main__":
    main()
