"""Counts what a computation holds and does while its tensors have shapes and no contents.

The step that is forecast is the step that is trained, run by the same code: only the weights, and
what is computed from them, are torch's fake tensors, which know shape and type and hold nothing.
What decides shapes (token ids, masks, the grids of images) is real.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmtune.forecast.work import (
    LANGUAGE,
    LANGUAGE_ATTENTION,
    PRODUCTS,
    VISION,
    VISION_ATTENTION,
    Work,
    attention_pairs,
)

ATTENTION = "scaled_dot_product"
COPIES = ("aten::_to_copy", "aten::clone")  # of a weight, e.g. in another number format
# A kernel that torch's own shape rules do not know.
FUSED_ADD = "mkldnn::_linear_pointwise.binary"

Phase = Literal["forward", "backward", "again"]


class Tally(TorchDispatchMode):
    """While it is entered, every tensor that is made or freed changes ``live``.

    Args:
        kind: Gives the tag of a new tensor, from itself and from ``tag``.
        weights: Which part a weight belongs to, by the weight's shape; for gradients.

    Attributes:
        live: Bytes of all storages that exist now, by the tag they were made under.
        peak: Most bytes at once.
        at_peak: What ``live`` was then.
        tag: What new storages are counted as.
        phase: Whose FLOPs are counted.
        kernels: Operations that compute something; views do not.
        work: What they compute.
    """

    def __init__(
        self, kind: Callable[[Tensor, str], str], weights: Mapping[tuple[int, ...], str]
    ) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.tag = "weights"
        self.phase: Phase = "forward"
        self.kernels = 0
        self.work = Work()
        self._kind = kind
        self._weights = weights
        self._part_of: dict[int, str] = {}
        self._attended: dict[tuple[int, ...], tuple[str, int]] = {}
        self._seen: dict[int, tuple[Any, str, int]] = {}

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is not counted yet, until it is freed."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._seen:
            return
        size, tag = storage.nbytes(), self._kind(tensor, self.tag)

        def freed(_: Any) -> None:
            _, was, bytes_freed = self._seen.pop(key)
            self._part_of.pop(key, None)
            self.live[was] -= bytes_freed
            self.total -= bytes_freed

        self._seen[key] = (weakref.ref(storage, freed), tag, size)
        self.live[tag] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.live)

    def count_as(self, tensor: Tensor, tag: str) -> None:
        """Count a tensor under another tag from now on."""
        self.note(tensor)
        key = id(tensor.untyped_storage())
        reference, was, size = self._seen[key]
        self._seen[key] = (reference, tag, size)
        self.live[was] -= size
        self.live[tag] += size

    def belongs(self, weight: Tensor, part: str) -> None:
        """Say whose a weight is, for the products it takes part in."""
        self._part_of[id(weight.untyped_storage())] = part

    def settle(self) -> None:
        """Forget the peak so far: it begins with what is there now."""
        self.peak, self.at_peak = self.total, dict(self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation, and count what it made."""
        kwargs, name = kwargs or {}, func.name()
        output = _run(func, name, args, kwargs)
        for made in tree_leaves(output):
            if isinstance(made, Tensor):
                self.note(made)
        if not func.is_view:
            self.kernels += 1
        if name in PRODUCTS:
            self._multiply(PRODUCTS[name](args, output), args, output)
        elif ATTENTION in name:
            self._attend(name, args, kwargs)
        elif name in COPIES and (part := self._part(args[0])) is not None:
            self.belongs(output, part)
        return output

    def _part(self, tensor: Any) -> str | None:
        if not isinstance(tensor, Tensor):
            return None
        return self._part_of.get(id(tensor.untyped_storage()))

    def _multiply(self, flops: int, args: Sequence[Any], output: Any) -> None:
        """Whose product it is, a weight says; of a weight's gradient, its shape."""
        owners = [part for part in map(self._part, args) if part is not None]
        shape = tuple(output.shape) if isinstance(output, Tensor) else ()
        part = owners[0] if owners else self._weights.get(shape) if len(shape) == 2 else None
        self._count(part or (VISION if self.tag == VISION else LANGUAGE), flops)

    def _attend(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if "backward" in name:
            # After the gradient come query and key; how far they look is known from the forward.
            part, pairs = self._attended[tuple(args[1].shape)]
            self._count(part, 8 * pairs)
            return
        part = VISION_ATTENTION if self.tag == VISION else LANGUAGE_ATTENTION
        shape, pairs = tuple(args[0].shape), attention_pairs(args, kwargs)
        part = self._attended.setdefault(shape, (part, pairs))[0]
        self._count(part, 4 * pairs)
        if self.phase == "forward":
            self.work.sequences[part] += args[0].shape[0]

    def _count(self, part: str, flops: int) -> None:
        counters = {
            "forward": self.work.forward,
            "backward": self.work.backward,
            "again": self.work.again,
        }
        counters[self.phase][part] += flops


def _run(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation; where its answer depends on what nobody knows, a plausible one."""
    if not any(isinstance(each, FakeTensor) for each in tree_leaves((args, kwargs))):
        return func(*args, **kwargs)
    if func is torch.ops.aten._local_scalar_dense.default:
        return 0.0 if args[0].is_floating_point() else 0  # a loss, a norm, a count of overflows
    if func is torch.ops.aten.index.Tensor:
        args = (args[0], _places(args[1]))
    if name == FUSED_ADD:
        return args[1].new_empty((*args[0].shape[:-1], args[2].shape[0]))
    return func(*args, **kwargs)


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A real mask as the places that it names: their number decides the shape."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found
