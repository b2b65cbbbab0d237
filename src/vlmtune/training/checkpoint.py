"""Writing checkpoints whole or not at all, and putting a run back where one says it stood."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmtune.errors import CheckpointError
from vlmtune.files import sync, to_json
from vlmtune.runs.checkpoints import checkpoints, seal, step_name, step_of
from vlmtune.training.distributed.ranks import Ranks
from vlmtune.training.distributed.strategy import Strategy, size_of

TEMPORARY = ".writing-"
MARGIN = 1.2  # room on the disk, in sizes of what is to be written


@dataclass
class State:
    """Where a run stands, besides its weights, optimizer and random states.

    Attributes:
        step: Optimizer steps done.
        samples: Rows trained, every epoch counted.
        tokens: Tokens seen.
        labels: Tokens trained on.
        seconds: Seconds spent training.
        best_by: What was measured to find the best step, ``probe_loss`` or a metric.
        best_step: The best step so far, or None.
        best_value: The measured value there.
        without_gain: Measurements of it since then.
        token_budget: Most tokens of one forward; a resumed run must cut alike.
        asked_budget: What it was before memory halved it.
        plan: Fingerprint of the plan.
        scaler: State of the fp16 gradient scaler; empty otherwise.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    labels: int = 0
    seconds: float = 0.0
    best_by: str = ""
    best_step: int | None = None
    best_value: float | None = None
    without_gain: int = 0
    token_budget: int = 0
    asked_budget: int = 0
    plan: str = ""
    scaler: dict[str, Any] | None = None


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint, copied while training stood still.

    Attributes:
        state: Where the run stands, with Python's random state.
        size: Bytes of the tensors of all processes.
        random_states: Every other random state, as tensors.
        write_weights: Writes weights and contract into the folder that it is given.
        write_optimizer: Writes what this process has to write of the optimizer.
    """

    state: dict[str, Any]
    size: int
    random_states: dict[str, Tensor]
    write_weights: Callable[[Path], None]
    write_optimizer: Callable[[Path], None]


def copy_contents(
    state: State,
    strategy: Strategy,
    weights: Mapping[str, Tensor],
    write_weights: Callable[[Path, dict[str, Tensor]], None],
) -> Contents:
    """Copy all that a checkpoint holds; all processes ask.

    Args:
        state: Where the run stands.
        strategy: Holds the weights and their optimizer.
        weights: What is saved of the model, by name.
        write_weights: Writes copies of ``weights``, and the contract, into a folder.
    """
    copies = strategy.gathered(weights)
    optimizer = strategy.snapshot()
    return Contents(
        state={**vars(state), "python_random": _python_random()},
        size=size_of(copies) + optimizer.size,
        random_states=_random_tensors(strategy.ranks),
        write_weights=lambda folder: write_weights(folder, copies),
        write_optimizer=optimizer.write,
    )


def make_room(folder: Path, step: int) -> Path:
    """An empty folder for a checkpoint, under a name that nobody takes for one.

    Raises:
        CheckpointError: If it cannot be made, e.g. on a full disk.
    """
    temporary = temporary_of(folder, step)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{temporary} could not be made for a checkpoint: {error}. The earlier ones are "
            "intact; make room and continue with --resume"
        ) from error
    return temporary


def write_checkpoint(folder: Path, contents: Contents, ranks: Ranks) -> None:
    """Write ``step-000042`` into a run's ``checkpoints`` folder.

    Args:
        folder: The ``checkpoints`` folder; ``make_room`` was called.
        contents: What to write.
        ranks: The processes of the run; all of them call, and the first one seals.

    Raises:
        CheckpointError: If it could not be written. The earlier ones are as they were.
    """
    step = int(contents.state["step"])
    target, temporary = folder / step_name(step), temporary_of(folder, step)
    try:
        if ranks.first:
            contents.write_weights(temporary)
            save_file(contents.random_states, temporary / "random.safetensors")
            (temporary / "state.json").write_text(to_json(contents.state) + "\n", encoding="utf-8")
        contents.write_optimizer(temporary)  # last: it is done when all processes have written
        if not ranks.first:
            return
        seal(temporary, step)
        if target.exists():  # of the same step, from before a resume: the same content, or damaged
            shutil.rmtree(target)
        temporary.rename(target)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {target} could not be written: {error}. The earlier ones are intact; make "
            "room and continue with --resume"
        ) from error


def require_room(folder: Path, size: int) -> None:
    """Refuse to begin what would not fit on the disk.

    Args:
        folder: Where it would be written; it, or a folder above it, exists.
        size: Bytes.

    Raises:
        CheckpointError: If there is less than 1.2 times that.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(place).free, round(MARGIN * size)
    if free < needed:
        raise CheckpointError(
            f"a checkpoint takes {gigabytes(size)}, and {folder} should have {gigabytes(needed)} "
            f"free for it; there are {gigabytes(free)}. Make room, or choose another disk with "
            "--run DIR; the checkpoints there are intact, --resume goes on from the newest"
        )


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def temporary_of(folder: Path, step: int) -> Path:
    """Where a checkpoint lies until it is complete."""
    return folder / f"{TEMPORARY}{step_name(step)}"


def remove_leftovers(folder: Path) -> None:
    """Delete what a kill left half written or half deleted; nothing else works in the run."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints and the best one, and leftovers of kills."""
    remove_leftovers(folder)
    for path in checkpoints(folder)[:-keep]:
        if step_of(path) != best_step:
            # Renamed first: a kill amid the deletion must not leave half a checkpoint by its name.
            doomed = path.with_name(f"{TEMPORARY}{path.name}-old")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def token_budgets_of(checkpoint: Path | None) -> tuple[int, int] | None:
    """The token budget that a checkpoint's run was cut with, and what it was in the beginning."""
    if checkpoint is None:
        return None
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    budget = int(state["token_budget"])
    return budget, int(state.get("asked_budget") or budget)


def load_state(folder: Path, strategy: Strategy) -> State:
    """Put optimizer, scaler and random states back, and say where the run stood.

    Weights are not touched. A process that the checkpoint's run did not have starts random numbers
    of its own.

    Raises:
        CheckpointError: If the optimizer's state belongs to other parameters.
    """
    raw = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    strategy.restore(folder)
    python = raw.pop("python_random")
    _restore_random(load_file(folder / "random.safetensors"), python, strategy.ranks)
    state = State(**raw)
    if state.scaler:
        strategy.scaler.load_state_dict(state.scaler)
    return state


def seed_random(seed: int) -> None:
    """Seed all that a checkpoint stores, so that a run does not depend on what came before it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _random_tensors(ranks: Ranks) -> dict[str, Tensor]:
    """Python's and NumPy's state of this process, torch's of every one."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    tensors = {
        "numpy.keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
    }
    for rank, value in enumerate(ranks.gather(torch.get_rng_state())):
        tensors[f"torch.{rank}"] = value
    if torch.cuda.is_available():
        for rank, value in enumerate(ranks.gather(torch.cuda.get_rng_state())):
            tensors[f"cuda.{rank}"] = value
    return tensors


def _python_random() -> list[Any]:
    version, internal, gauss = random.getstate()
    return [version, list(internal), gauss]


def _restore_random(tensors: dict[str, Tensor], python: list[Any], ranks: Ranks) -> None:
    own = f"torch.{ranks.rank}"
    if own in tensors:
        torch.set_rng_state(tensors[own])
    position, has_gauss, gauss = tensors["numpy.rest"].tolist()
    keys = tensors["numpy.keys"].numpy().astype(np.uint32)
    state = ("MT19937", keys, int(position), int(has_gauss), gauss)
    np.random.set_state(state)
    random.setstate((python[0], tuple(python[1]), python[2]))
    if torch.cuda.is_available() and f"cuda.{ranks.rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"cuda.{ranks.rank}"])
