"""Unpacking 4-bit weights: in plain torch, or in one compiled kernel where a compiler is installed.

Both give the same bits: reading nibbles is fused, and the one rounding is that of the product with
the scale. Kernels that multiply without unpacking (Marlin, ExLlama, torch's own for int4) round the
scales or the sums in another way, and what is trained would not be what is served.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# qweight, qzeros, scales, g_idx -> weights (inputs, outputs), in the format of the scales.
Unpack = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Of a model: compiling takes five seconds, a forward of this size unpacks for a third of one.
LEAST_WEIGHTS = 10**8


def unpack_plain(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """Unpack step by step.

    Args:
        qweight: Eight values in each int32, ``(inputs / 8, outputs)``.
        qzeros: Eight zeros less one in each, ``(groups, outputs / 8)``.
        scales: ``(groups, outputs)``.
        g_idx: The group of each input, ``(inputs,)``.

    Returns:
        ``scale * (value - zero)``, ``(inputs, outputs)``.
    """
    groups = g_idx.long()
    values = _nibbles(qweight).permute(0, 2, 1).reshape(len(g_idx), -1)
    zeros = _nibbles(qzeros).reshape(len(qzeros), -1) + 1
    return (values - zeros[groups]) * scales[groups]


def _unpack_shifting(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """The same in operations that a compiler fuses."""
    groups = g_idx.long()
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=qweight.device)
    values = ((qweight[:, None, :] >> shifts[None, :, None]) & 15).reshape(len(g_idx), -1)
    zeros = ((qzeros[:, :, None] >> shifts) & 15).reshape(len(qzeros), -1) + 1
    return (values - zeros[groups]).to(torch.int8) * scales[groups]


def unpacker(device: torch.device, weights: int) -> Unpack:
    """The fastest way to unpack that gives the same bits.

    Args:
        device: Where the packed weights are.
        weights: How many the model has in all.
    """
    if weights < LEAST_WEIGHTS or not has_compiler(device.type):
        return unpack_plain
    return _compiled(device)


def has_compiler(device: str) -> bool:
    """Whether torch can compile for a kind of device."""
    if device == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device == "cpu" and any(map(shutil.which, ("g++", "clang++", "c++")))


@cache
def _compiled(device: torch.device) -> Unpack:
    """A compiled kernel that was compared with plain torch, or plain torch."""
    parts = _sample(device)
    try:
        with warnings.catch_warnings():  # of the compiler's own parts
            warnings.simplefilter("ignore")
            kernel: Unpack = torch.compile(_unpack_shifting, dynamic=True)
            same = torch.equal(kernel(*parts), unpack_plain(*parts))
    except Exception as error:  # noqa: BLE001 - compilers fail in many ways, and none is needed
        return _refused(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return kernel if same else _refused("it gives other weights")


def _refused(reason: str) -> Unpack:
    logger.warning(
        "the kernel that unpacks 4-bit weights could not be used (%s); plain torch unpacks them, "
        "with the same results and more slowly",
        reason,
    )
    return unpack_plain


def _sample(device: torch.device, inputs: int = 256, outputs: int = 64) -> tuple[Any, ...]:
    """A packed layer of every value, its groups in no order."""
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> Tensor:
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator)
        return bits.to(torch.int32).to(device)

    groups = inputs // 32
    scales = torch.rand(groups, outputs, generator=generator).half()
    order = torch.randperm(inputs, generator=generator) % groups
    return (
        words(inputs // 8, outputs),
        words(groups, outputs // 8),
        scales.to(device),
        order.to(torch.int32).to(device),
    )


def _nibbles(packed: Tensor) -> Tensor:
    """The eight values in each int32, ``(rows, columns, 8)``, int8."""
    octets = packed.contiguous().view(torch.uint8).view(*packed.shape, 4)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2).to(torch.int8)
