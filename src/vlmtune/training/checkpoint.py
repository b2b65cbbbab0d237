"""Writing checkpoints whole or not at all, and putting a run back where one says it stood."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmtune.errors import CheckpointError
from vlmtune.files import sync, to_json
from vlmtune.runs.checkpoints import checkpoints, seal, step_of
from vlmtune.training.distributed import Ranks

TEMPORARY = ".writing-"


@dataclass
class State:
    """Where a run stands, besides its weights, optimizer and random states.

    Attributes:
        step: Optimizer steps done.
        samples: Rows trained, every epoch counted.
        tokens: Tokens seen.
        labels: Tokens trained on.
        seconds: Seconds spent training.
        best_step: Step of the lowest probe loss so far, or None.
        best_loss: That loss.
        token_budget: Most tokens of one forward; a resumed run must cut alike.
        plan: Fingerprint of the plan.
        scaler: State of the fp16 gradient scaler; empty otherwise.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    labels: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    token_budget: int = 0
    plan: str = ""
    scaler: dict[str, Any] | None = None


def save_checkpoint(
    folder: Path,
    state: State,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    write_weights: Callable[[Path], None],
    ranks: Ranks,
) -> Path | None:
    """Write ``step-000042`` into a run's ``checkpoints`` folder.

    Args:
        folder: The ``checkpoints`` folder.
        state: Where the run stands.
        optimizer: The optimizer of ``parameters``.
        parameters: What trains, by name.
        write_weights: Writes weights and contract into the folder that it is given.
        ranks: The processes of the run; all of them call, and the first one writes.

    Returns:
        The checkpoint's folder, in the process that wrote it.
    """
    random_states = _random_tensors(ranks)
    if not ranks.first:
        return None
    target = folder / f"step-{state.step:06d}"
    temporary = folder / f"{TEMPORARY}{target.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_weights(temporary)
        save_file(_optimizer_tensors(optimizer, parameters), temporary / "optimizer.safetensors")
        save_file(random_states, temporary / "random.safetensors")
        (temporary / "state.json").write_text(
            to_json({**vars(state), "python_random": _python_random()}) + "\n", encoding="utf-8"
        )
        seal(temporary, state.step)
        if target.exists():  # of the same step, from before a resume: the same content, or damaged
            shutil.rmtree(target)
        temporary.rename(target)
        sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {target} could not be written: {error}. The earlier ones are intact; make "
            "room and continue with --resume"
        ) from error
    return target


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


def token_budget_of(checkpoint: Path | None) -> int | None:
    """The token budget that a checkpoint's run was cut with."""
    if checkpoint is None:
        return None
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return int(state["token_budget"])


def load_state(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    ranks: Ranks,
) -> State:
    """Put optimizer and random states back, and say where the run stood. Weights are not touched.

    A process that the checkpoint's run did not have starts random numbers of its own.

    Raises:
        CheckpointError: If the optimizer's state belongs to other parameters.
    """
    raw = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    _restore_optimizer(optimizer, parameters, load_file(folder / "optimizer.safetensors"))
    _restore_random(load_file(folder / "random.safetensors"), raw.pop("python_random"), ranks)
    return State(**raw)


def seed_random(seed: int) -> None:
    """Seed all that a checkpoint stores, so that a run does not depend on what came before it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}::{key}"] = value.detach().clone().cpu().contiguous()
    return tensors


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], saved: dict[str, Tensor]
) -> None:
    strangers = {key.rsplit("::", 1)[0] for key in saved} - set(parameters)
    if strangers:
        raise CheckpointError(
            f"the checkpoint's optimizer holds {len(strangers)} parameters that do not train now "
            f"(first: {sorted(strangers)[0]}); the recipe's tuning section changed"
        )
    for key, value in saved.items():
        name, entry = key.rsplit("::", 1)
        parameter = parameters[name]
        # Adam's step counter stays where it was; the moments go where the weights are.
        device = parameter.device if entry != "step" else value.device
        optimizer.state[parameter][entry] = value.to(device)


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
