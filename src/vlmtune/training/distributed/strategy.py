"""How the processes of a run hold the weights, and how a step's gradients become its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmtune.errors import CheckpointError
from vlmtune.training.distributed.parts import read_parts
from vlmtune.training.distributed.ranks import Ranks

OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """A copy of the optimizer's state, as far as this process writes it.

    Attributes:
        size: Bytes of what all processes write.
        write: Writes it into a checkpoint's folder; returns when all processes have written.
    """

    size: int
    write: Callable[[Path], None]


@dataclass
class Strategy:
    """Every process holds everything (``ddp``), and a single one too.

    Attributes:
        ranks: The processes.
        parameters: What trains, by name.
        optimizer: Of these parameters.
        scaler: The fp16 gradient scaler; disabled otherwise.
        device: Where the model computes; offloaded weights lie elsewhere.
        module: What is called instead of the model while it trains.
        in_step: Whether all processes must forward equally often, and alike each time.
        cuts_weights: Whether they must do so where nothing trains, too.
    """

    ranks: Ranks
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    module: nn.Module
    in_step: ClassVar[bool] = False
    cuts_weights: ClassVar[bool] = False

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one forward's loss to this process's."""
        if loss.requires_grad:
            self.scaler.scale(loss).backward()

    def add_up(self) -> None:
        """Make the gradients those of the whole step, after its last backward."""
        self.ranks.add_gradients(self.parameters.values())
        # Nothing moves where the vision tower alone trains, and no row of the step has an image.
        if self._moves:
            self.scaler.unscale_(self.optimizer)

    def norms(self) -> dict[str, float]:
        """Norm of each parameter's gradient in this step, where it has one; all processes ask."""
        return norms_of(self.parameters)

    def stop_watching(self) -> None:
        """Nobody will ask for ``norms`` again."""

    def move(self, limit: float, *, finite: bool) -> float:
        """Clip the gradients, move the weights, forget the gradients.

        Args:
            limit: The norm to scale the gradients down to; 0 leaves them.
            finite: Whether the loss is. Weights are not moved by what is not finite.

        Returns:
            The gradients' norm before.
        """
        most = limit if limit > 0 else math.inf
        norm = float(whole(nn.utils.clip_grad_norm_(self.parameters.values(), most)))
        # The scaler leaves a step out by itself where a gradient overflowed, and lowers its scale.
        if self._moves and ((finite and math.isfinite(norm)) or self.scaler.is_enabled()):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole copies in the memory of the CPU; in the first process, nothing in the others.

        Names of one tensor stay names of one copy.
        """
        copies: dict[int, Tensor] = {}
        for tensor in tensors.values():
            if id(tensor) not in copies:
                complete = whole(tensor.detach())
                kept = complete.to("cpu", copy=True) if self.ranks.first else complete.new_empty(0)
                copies[id(tensor)] = kept.contiguous()
        if not self.ranks.first:
            return {}
        return {name: copies[id(tensor)] for name, tensor in tensors.items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state of every parameter, as ``name::entry``."""
        return {
            f"{name}::{entry}": value
            for name, parameter in self.parameters.items()
            for entry, value in self.optimizer.state.get(parameter, {}).items()
        }

    def snapshot(self) -> Snapshot:
        """Copy the optimizer's state now, to be written into a checkpoint's folder later."""
        tensors = self.gathered(self.optimizer_tensors())

        def write(folder: Path) -> None:
            if self.ranks.first:
                save_file(tensors, folder / OPTIMIZER)

        return Snapshot(size_of(tensors), write)

    def restore(self, checkpoint: Path) -> None:
        """Put the optimizer's state of a checkpoint back, however many processes wrote it.

        Raises:
            CheckpointError: If it belongs to other parameters.
        """
        file = checkpoint / OPTIMIZER
        self._put(load_file(file) if file.exists() else read_parts(checkpoint, self.parameters))

    @property
    def _moves(self) -> bool:
        return any(parameter.grad is not None for parameter in self.parameters.values())

    def _put(self, saved: Mapping[str, Tensor]) -> None:
        check_names(saved, self.parameters)
        for key, value in saved.items():
            name, entry = key.rsplit("::", 1)
            parameter = self.parameters[name]
            # The moments go where the weights are, and Adam's step counter where it was made.
            fused = bool(self.optimizer.defaults.get("fused"))
            place = parameter.device if entry != "step" or fused else value.device
            self.optimizer.state[parameter][entry] = value.to(place)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts that other processes hold; all of them must ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def norms_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Norm of the gradient of each parameter that has one."""
    return {
        name: float(whole(torch.linalg.vector_norm(parameter.grad.float())))
        for name, parameter in parameters.items()
        if parameter.grad is not None
    }


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors, each counted once; of a slice, those of the whole."""
    once = {id(tensor): tensor for tensor in tensors.values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in once.values())


def check_names(saved: Iterable[str], parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse the optimizer's state of parameters that do not train.

    Raises:
        CheckpointError: Naming the first.
    """
    strangers = {key.rsplit("::", 1)[0] for key in saved} - set(parameters)
    if strangers:
        raise CheckpointError(
            f"the checkpoint's optimizer holds {len(strangers)} parameters that do not train now "
            f"(first: {sorted(strangers)[0]}); the recipe's tuning section changed"
        )
