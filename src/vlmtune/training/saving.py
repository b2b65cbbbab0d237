"""Checkpoints written behind the training: it waits for a copy in memory, not for the disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from vlmtune.errors import CheckpointError
from vlmtune.training.checkpoint import (
    Contents,
    State,
    copy_contents,
    make_room,
    prune,
    require_room,
    write_checkpoint,
)
from vlmtune.training.distributed.strategy import Strategy

logger = logging.getLogger(__name__)


@dataclass
class Saver:
    """Writes a run's checkpoints, one at a time; leaving it waits for the last.

    All processes have one. What they write together is sealed by the first.

    Attributes:
        folder: The run's ``checkpoints``.
        strategy: Holds the weights and their optimizer.
        weights: What is saved of the model, by name, asked for anew each time.
        write_weights: Writes copies of them, and the contract, into a folder.
        keep: Newest checkpoints to keep; the best one stays besides.
        behind: Whether training goes on while the copy is written.
    """

    folder: Path
    strategy: Strategy
    weights: Callable[[], Mapping[str, Tensor]]
    write_weights: Callable[[Path, dict[str, Tensor]], None]
    keep: int
    behind: bool = True
    _thread: threading.Thread | None = field(default=None, init=False)
    _fault: BaseException | None = field(default=None, init=False)

    def save(self, state: State) -> None:
        """Copy everything, and write it; waits for the checkpoint before.

        Raises:
            CheckpointError: If there is no room, or the checkpoint before could not be written.
        """
        self.wait()
        state = replace(state)
        contents = copy_contents(state, self.strategy, self.weights(), self.write_weights)
        ranks = self.strategy.ranks
        fault = self._begun(contents.size, state.step) if ranks.first else None
        if ranks.any(fault is not None):  # all know by now that they may write, or may not
            raise fault or CheckpointError("the first process could not begin a checkpoint")
        if not self.behind:
            self._write(contents, state)
            return
        self._thread = threading.Thread(
            target=self._try, args=(contents, state), name="vlmtune-saver", daemon=True
        )
        self._thread.start()

    def _begun(self, size: int, step: int) -> CheckpointError | None:
        """Make the folder to write into; what hinders it is told to all processes."""
        try:
            require_room(self.folder, size)
            make_room(self.folder, step)
        except CheckpointError as error:
            return error
        return None

    def check(self) -> None:
        """Raise what went wrong behind the training's back, if anything did."""
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def wait(self) -> None:
        """Go on when the last checkpoint is on the disk.

        Raises:
            CheckpointError: If it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _try(self, contents: Contents, state: State) -> None:
        try:
            self._write(contents, state)
        except BaseException as error:  # noqa: BLE001  # raised by the thread that trains
            self._fault = error

    def _write(self, contents: Contents, state: State) -> None:
        write_checkpoint(self.folder, contents, self.strategy.ranks)
        if self.strategy.ranks.first:
            prune(self.folder, self.keep, state.best_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the last checkpoint; a fault of its own is told beside the one that left."""
        if error is None:
            self.wait()
            return
        try:
            self.wait()
        except Exception as fault:  # noqa: BLE001
            logger.error("the last checkpoint is missing: %s", fault)
