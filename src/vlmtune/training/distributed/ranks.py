"""Several processes that train one model: what they tell each other, and nothing else.

The loss of a step is a sum over its labels, so that the gradients of all processes add up to the
step's own, however its packs were dealt.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 2**24  # numbers that travel together: 64 MB of fp32
PATIENCE = timedelta(hours=6)  # the others wait while the first writes a checkpoint or the report


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. A single one is a world of its own, and sends nothing.

    Attributes:
        rank: This process, from 0.
        count: How many there are.
        local: This process among those of its machine, from 0.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

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

    def highest(self, value: int) -> int:
        """The highest of all processes' values."""
        return max(int(each) for each in self.gather(torch.tensor(value)))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes, in place.

        By hand, after the last backward: a process whose packs hold no image, or that has no pack
        at all, sends zeros for what it did not touch, and nobody waits for a forward that never
        comes. A parameter that no process has a gradient for keeps None.
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
                local = tensor.to(_device())  # itself, if it is there already
                dist.broadcast(local, src=0)
                tensor.copy_(local)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of the same shape from every process, in their order."""
        if self.count == 1:
            return [tensor]
        local = tensor.to(_device())
        gathered = [torch.empty_like(local) for _ in range(self.count)]
        dist.all_gather(gathered, local)
        return [part.to(tensor.device) for part in gathered]

    def gather_json(self, value: Any) -> list[Any]:
        """What JSON can hold, from every process, in their order. Nothing is pickled."""
        if self.count == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self.gather(torch.tensor(len(content)))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(content)] = content
        parts = zip(self.gather(padded), sizes, strict=True)
        return [json.loads(part[:size].numpy().tobytes()) for part, size in parts]

    def wait(self) -> None:
        """Go on when all are here."""
        self.total(0.0)

    @contextmanager
    def one_goes_first(self) -> Iterator[None]:
        """Let one process of each machine do something before the others do it.

        What it fetches or computes then lies in a cache that they find.
        """
        if self.local > 0:
            self.wait()
        yield
        if self.local == 0:
            self.wait()


def join() -> Ranks:
    """The processes that a launcher such as torchrun started; one where there was none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not dist.is_initialized():
        # Its functions keep the group there is when it is first imported as a default for ever, and
        # a group that is kept cannot be closed; transformers imports it sooner or later.
        import torch.distributed.nn.functional

        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"  # offloaded weights are summed on the CPU
        dist.init_process_group(backend, timeout=PATIENCE)
        atexit.register(leave)  # left to the interpreter's end, their threads abort it
    return Ranks(dist.get_rank(), dist.get_world_size(), local)


def leave() -> None:
    """Close the connections; after a fault of another process they may be broken already.

    Their threads end when nothing holds the groups any more. One that lets go of a tensor while the
    interpreter ends would abort the process.
    """
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
        gc.collect()  # a model that refers to itself may hold a group


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
