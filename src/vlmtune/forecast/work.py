"""Floating-point operations of single operations of torch, and whose they are.

Counted as is usual for a model's FLOPs: a multiplication with its addition is two, causal attention
half of the square, nothing for norms and activations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

VISION, PROJECTOR, LANGUAGE, HEAD = "vision", "projector", "language", "head"
VISION_ATTENTION, LANGUAGE_ATTENTION = "vision attention", "language attention"


@dataclass
class Work:
    """FLOPs of one step, by part: linear layers and convolutions, the output layer, attention.

    Attributes:
        forward: Of the forward pass.
        backward: Of the backward pass.
        again: What checkpointing computes a second time.
        sequences: How many sequences attention was given in the forward pass: of the tower, images
            (or tiles) × layers.
    """

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    sequences: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> Counter[str]:
        """Forward and backward, without what is computed again: the model's FLOPs."""
        return self.forward + self.backward


def _matrices(args: Sequence[Any], output: Any) -> int:  # noqa: ARG001
    first, second = args[-2], args[-1]
    return 2 * first.numel() * int(second.shape[-1])


def _added(args: Sequence[Any], output: Any) -> int:  # noqa: ARG001
    return _matrices(args[1:3], None)


def _pointwise(args: Sequence[Any], output: Any) -> int:
    return 2 * output.numel() * int(args[0].shape[-1])


def _convolution(args: Sequence[Any], output: Any) -> int:
    return 2 * output.numel() * prod(args[1].shape[1:])


def _convolution_backward(args: Sequence[Any], output: Any) -> int:
    wanted = sum(isinstance(each, Tensor) for each in output[:2])
    return 2 * args[0].numel() * prod(args[2].shape[1:]) * wanted


PRODUCTS: dict[str, Callable[[Sequence[Any], Any], int]] = {
    "aten::mm": _matrices,
    "aten::bmm": _matrices,
    "aten::addmm": _added,
    "aten::baddbmm": _added,
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "mkldnn::_linear_pointwise.binary": _pointwise,
    "mkldnn::_linear_pointwise": _pointwise,
}


def attention_pairs(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Multiplications of one of attention's two products: batch × heads × queries × keys × width.

    Half of them where each token sees only those before it.
    """
    query, key = args[0], args[1]
    pairs = prod(query.shape) * int(key.shape[-2])
    # Packed rows come one by one, without a mask, and are told to look back only.
    causal = bool(kwargs.get("is_causal")) or any(each is True for each in args[3:6])
    return pairs // 2 if causal else pairs
