"""Several processes that train one model: what they tell each other, and nothing else.

The loss of a step is a sum over its labels, so that the gradients of all processes add up to the
step's own, however its packs were dealt. They are added by hand after the last backward: a process
whose packs hold no image, or that has no pack at all, sends zeros for what it did not touch, and
nobody waits for a forward that never comes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 2**24  # numbers that travel together: 64 MB of fp32
PATIENCE = timedelta(days=2)  # the first process evaluates while the others wait


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. A single one is a world of its own, and sends nothing.

    Attributes:
        rank: This process, from 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes, measures and speaks for all."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Sums over all processes, exact to float64."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process, e.g. that a signal arrived."""
        return self.total(float(flag))[0] > 0

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes, in place.

        A parameter that no process has a gradient for keeps None.
        """
        if self.count == 1:
            return
        trained = list(parameters)
        touched = torch.tensor(
            [parameter.grad is not None for parameter in trained], device=_device()
        )
        counts = touched.to(torch.int32)
        dist.all_reduce(counts)
        shared = [
            parameter for parameter, count in zip(trained, counts.tolist(), strict=True) if count
        ]
        for parameter in shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([_gradient(parameter) for parameter in shared]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with the first process's."""
        if self.count == 1:
            return
        with torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of the same shape from every process, in their order."""
        if self.count == 1:
            return [tensor]
        local = tensor.to(_device())
        gathered = [torch.empty_like(local) for _ in range(self.count)]
        dist.all_gather(gathered, local)
        return [part.to(tensor.device) for part in gathered]

    def wait(self) -> None:
        """Go on when all are here."""
        self.total(0.0)


def join() -> Ranks:
    """The processes that a launcher such as torchrun started; one where there was none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Close the connections; after a fault of another process they may be broken already."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def deal(loads: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal packs so that the heaviest hand is light: the heaviest pack first, to the lightest hand.

    Args:
        loads: Tokens of each pack.
        ranks: Number of processes.

    Returns:
        Indices into ``loads``, one list a process, each in the order of ``loads``.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    weights = [0] * ranks
    for index in sorted(range(len(loads)), key=lambda index: (-loads[index], index)):
        lightest = min(range(ranks), key=lambda rank: (weights[rank], rank))
        hands[lightest].append(index)
        weights[lightest] += loads[index]
    return [sorted(hand) for hand in hands]


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _buckets(gradients: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Runs of gradients of one number format that are worth one message."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(each.numel() for each in bucket) + gradient.numel() > BUCKET
        if bucket and (full or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
