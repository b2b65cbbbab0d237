"""An output layer that can make the loss itself, without ever holding the logits of all labels.

At a vocabulary of 151,936 the logits of 500 labels are 300 MB, their logarithms and gradients as
much again each. Here a chunk of labels at a time is multiplied, weighed, and multiplied back, in
one piece of memory; the gradient of the hidden states is ready when the loss is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vlmtune.models.products import Linear, is_worth, multiply

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MANY = 2**22  # logits; fewer are made all at once
CHUNK = {"cpu": 2**24, "cuda": 2**28}  # logits at a time: 64 MB in fp32, 1 GB on a GPU


@dataclass
class Request:
    """What is asked of the output layer for one forward.

    Attributes:
        targets: The ids to predict, ``(labels,)``.
        loss: Their summed loss, ``(1,)``, if the layer made it; None: it made logits.
    """

    targets: Tensor
    loss: Tensor | None = None


REQUEST: ContextVar[Request | None] = ContextVar("request", default=None)


@contextmanager
def loss_wanted(targets: Tensor) -> Iterator[Request]:
    """Ask for the loss in the place of logits; the layer answers so where that is worth it."""
    request = Request(targets)
    token = REQUEST.set(request)
    try:
        yield request
    finally:
        REQUEST.reset(token)


def use_loss_head(model: PreTrainedModel) -> None:
    """Let a model's output layer make losses, in place; adapted and quantised ones stay."""
    head = model.get_output_embeddings()
    if type(head) in (nn.Linear, Linear):
        head.__class__ = LossHead


class LossHead(Linear):
    """An output layer that answers ``loss_wanted``; to everybody else it gives logits.

    Attributes:
        final: Whether the model hands its output on as it is; one that does not gets logits.
    """

    final: bool = True

    def forward(self, input: Tensor) -> Tensor:
        """``input (labels, hidden)`` to ``(labels, vocabulary)``, or to the loss, ``(1,)``."""
        request = REQUEST.get()
        if request is None or not self._makes_loss(input, request.targets):
            return super().forward(input)
        hidden, weight, bias = input, self.weight, self.bias
        kind = input.device.type
        if torch.is_autocast_enabled(kind):  # once, and not for each chunk
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)  # type: ignore[assignment]
        with torch.autocast(kind, enabled=False):
            loss = _ChunkedLoss.apply(hidden, weight, bias, request.targets)
        request.loss = cast("Tensor", loss)
        return request.loss

    def _makes_loss(self, hidden: Tensor, targets: Tensor) -> bool:
        kind = hidden.device.type
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
        return (
            self.final
            and hidden.dim() == 2
            and len(hidden) == len(targets)
            and len(targets) * self.out_features >= MANY
            and kind in CHUNK
            # Unscaled, a gradient of 1 / vocabulary is nothing in fp16.
            and not half
            and self.weight.dtype is not torch.float16
        )


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of ``hidden @ weight.T + bias``, its gradients made on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        of_hidden, of_weight, of_bias, _ = ctx.needs_input_grad
        precise = torch.promote_types(hidden.dtype, torch.float32)  # float64 stays
        total = torch.zeros(1, dtype=precise, device=hidden.device)
        gradients = [
            torch.zeros_like(tensor, dtype=precise) if wanted and tensor is not None else None
            for tensor, wanted in ((hidden, of_hidden), (weight, of_weight), (bias, of_bias))
        ]
        rows = max(1, CHUNK[hidden.device.type] // len(weight))
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            aims = targets[chunk].unsqueeze(1)
            chances = _product(hidden[chunk], weight, bias).to(precise)
            chances -= chances.amax(1, keepdim=True)
            total -= chances.gather(1, aims).sum()
            sums = chances.exp_().sum(1, keepdim=True)
            total += sums.log().sum()
            if of_hidden or of_weight or of_bias:
                chances /= sums
                chances.scatter_add_(1, aims, torch.full_like(sums, -1.0))
                _add_gradients(gradients, chances.to(weight.dtype), hidden, weight, chunk)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradients[0]
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        hidden, weight = ctx.dtypes
        return (
            None if of_hidden is None else (of_hidden * scale).to(hidden),
            None if of_weight is None else (of_weight * scale).to(weight),
            None if of_bias is None else (of_bias * scale).to(weight),
            None,
        )


def _add_gradients(
    gradients: list[Tensor | None], of_logits: Tensor, hidden: Tensor, weight: Tensor, chunk: slice
) -> None:
    of_hidden, of_weight, of_bias = gradients
    if of_hidden is not None:
        of_hidden[chunk] = _product(of_logits, weight.t(), None)
    if of_weight is not None:
        of_weight += of_logits.t() @ hidden[chunk]
    if of_bias is not None:
        of_bias += of_logits.sum(0)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if is_worth(inputs, weight):
        return multiply(inputs, weight, bias)
    return nn.functional.linear(inputs, weight, bias)
