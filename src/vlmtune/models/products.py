"""The matrix products of linear layers and patch embeddings, as fast as the machine makes them.

Layers change their class in place and nothing else: weights, names, hooks and ``isinstance`` stay.
What they compute is the same product summed in another order (1e-6 of it in fp32).

- Intel's MKL, which torch multiplies fp32 matrices with, does not use AVX-512 on AMD's processors;
  oneDNN, which comes with torch too, does: 2.2 times the speed, measured on an EPYC.
- A patch embedding whose input is its patches is one matrix product. As a Conv3d it was 3 times
  slower on a CPU, and much more than that on GPUs since torch 2.9.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

FEW_ROWS = 32  # below, oneDNN takes as long to begin as MKL takes in all
SMALL = 2**20  # multiplications: below, what Python adds is more than what is gained
CPU_FACTS = Path("/proc/cpuinfo")
# Each number of rows has a kernel of its own, made in a quarter of a millisecond (much more on a
# busy machine), and every pack has its own number: rows are filled up with zeros to one of 16
# numbers an octave, of the multiples of 8 below 256. The 1,024 kernels that oneDNN keeps are then
# enough, at 0.5 MB each.
SMALLEST_STEP = 8
# A server runs for weeks and its packs are small: what it holds shall not grow for hours. Two
# caches lie on each other, oneDNN's and, in each thread, that of torch's way to it; both read
# their size at the process's first product.
KERNELS_OF_A_SERVER = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}


def speed_up(model: nn.Module) -> None:
    """Give a model's linear layers and patch embeddings the faster products, in place.

    Asked again after adapters were put in, it finds theirs. Layers of other classes (quantised
    ones) stay as they are.
    """
    faster = onednn_is_faster()
    for module in model.modules():
        if type(module) is nn.Linear and faster:
            module.__class__ = Linear
        elif type(module) is nn.Conv3d and _cuts_patches(module):
            module.__class__ = PatchConv3d


def keep_few_kernels() -> None:
    """Let the products of this process, of which none is made yet, keep few of their kernels."""
    for name, count in KERNELS_OF_A_SERVER.items():
        os.environ.setdefault(name, count)


@cache
def onednn_is_faster(facts: Path = CPU_FACTS) -> bool:
    """Whether fp32 products are faster by oneDNN than as torch makes them on this processor.

    Decided by what the processor is, and not by a measurement: a resumed run must decide alike.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not facts.is_file():
        return False
    text = facts.read_text(encoding="utf-8", errors="replace")
    return "AuthenticAMD" in text and " avx512f " in text


def multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``inputs @ weight.T + bias`` by oneDNN, without a gradient; ``(rows, width)`` each."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return product


def add_product(total: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """``total + inputs @ weight.T`` by oneDNN in one pass, without a gradient."""
    added: Tensor = torch.ops.mkldnn._linear_pointwise.binary(inputs, total, weight, None, "add")
    return added


def filled_up(rows: Tensor) -> Tensor:
    """``rows (count, width)``, and zeros up to a number of rows that has its kernel already."""
    count = len(rows)
    whole = filled_count(count)
    if whole == count:
        return rows
    filled = rows.new_empty(whole, rows.shape[1])
    filled[:count].copy_(rows)
    filled[count:].zero_()
    return filled


def filled_count(count: int) -> int:
    """The next of 16 numbers an octave, at most a sixteenth more; of the multiples of 8 to 256."""
    step = max(SMALLEST_STEP, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def is_worth(inputs: Tensor, weight: Tensor) -> bool:
    """Whether a product is for oneDNN: fp32 on the CPU, no autocast, and large enough."""
    if torch.compiler.is_compiling():  # first: a compiler makes its own products
        return False
    rows = inputs.numel() // max(1, inputs.shape[-1])
    return (
        onednn_is_faster()
        and inputs.dtype is weight.dtype is torch.float32
        and inputs.device.type == weight.device.type == "cpu"
        and rows >= FEW_ROWS
        and rows * weight.numel() >= SMALL
        and not torch.is_autocast_enabled("cpu")
    )


def is_worth_in_bf16(inputs: Tensor, weight: Tensor) -> bool:
    """Whether products in bf16 on the CPU are worth fusing; one alone torch gives to oneDNN."""
    if torch.compiler.is_compiling():
        return False
    return (
        onednn_is_faster()
        and inputs.dtype is weight.dtype is torch.bfloat16
        and inputs.device.type == weight.device.type == "cpu"
        and inputs.numel() >= FEW_ROWS * inputs.shape[-1]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class Linear(nn.Linear):
    """A linear layer whose large fp32 products on a CPU are oneDNN's, forward and backward."""

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """``input (…, in_features)`` to ``(…, out_features)``."""
        if not is_worth(input, self.weight):
            return super().forward(input)
        return cast("Tensor", _Product.apply(input, self.weight, self.bias))


class _Product(torch.autograd.Function):
    """``inputs @ weight.T + bias``; computes the gradients that are asked for alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        rows = inputs.reshape(-1, inputs.shape[-1])
        product = multiply(filled_up(rows), weight, bias)[: len(rows)]
        return product.view(*inputs.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        rows = inputs.reshape(-1, weight.shape[1])
        gradient = filled_up(gradients[0].reshape(-1, weight.shape[0]))
        return (
            multiply(gradient, weight.t())[: len(rows)].view(inputs.shape) if of_inputs else None,
            multiply(gradient.t(), filled_up(rows).t()) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


class PatchConv3d(nn.Conv3d):
    """A convolution without overlap: of inputs as large as its kernel, one matrix product."""

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """``input (patches, channels, time, height, width)``."""
        if input.dim() != 5 or tuple(input.shape[2:]) != self.kernel_size:
            return super().forward(input)
        weight, rows = self.weight.flatten(1), input.flatten(1)  # (patches, values of a patch)
        if is_worth(rows, weight):
            product = cast("Tensor", _Product.apply(rows, weight, self.bias))
        else:
            product = nn.functional.linear(rows, weight, self.bias)
        return product[:, :, None, None, None]


def _cuts_patches(layer: nn.Conv3d) -> bool:
    """Whether inputs as large as the kernel become one value a channel."""
    return (
        all(size == 0 for size in layer.padding)
        and all(size == 1 for size in layer.dilation)
        and layer.groups == 1
    )
