"""LoRA on a CPU without passes over memory between its products.

peft computes ``base(x) + B(A(x)) * scaling`` operation by operation: on a CPU the multiplication
and the additions, forward and backward, take as long as half of the products. Here they are part of
the products; the result is the same but for the order of its sums (1e-6 of it in fp32).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from vlmtune.models import products


def fuse(model: nn.Module) -> None:
    """Let plain LoRA layers compute fused where that is faster, in place."""
    if not products.onednn_is_faster():
        return
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is products.Linear:
            module.__class__ = FusedLora


class FusedLora(LoraLinear):
    """A LoRA layer that computes fused while its one plain adapter trains, else as peft does."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x (…, in_features)`` to ``(…, out_features)``."""
        name = self.active_adapters[0]
        base = self.base_layer
        plain = (
            not args
            and not kwargs
            and not self.disable_adapters
            and not self.merged
            and self.active_adapters == [name]
            and name in self.lora_A
            and name not in self.lora_variant
            and not base.weight.requires_grad
            and getattr(self.lora_dropout[name], "p", 0.0) < 1
        )
        if not plain or not self._is_worth(x, name):
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[name]
        share = dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0
        kept = keeps(draw(x), share, x.dtype) if share > 0 else None
        first, second = self.lora_A[name].weight, self.lora_B[name].weight
        scaling = self.scaling[name] / (1 - share)
        return cast(
            "Tensor",
            _Fused.apply(x, kept, base.weight, base.bias, first, second, scaling),
        )

    def _is_worth(self, x: Tensor, name: str) -> bool:
        first, second = self.lora_A[name], self.lora_B[name]
        base = cast("Tensor", self.base_layer.weight)
        return (
            (products.is_worth(x, base) or products.is_worth_in_bf16(x, base))
            and first.weight.dtype is second.weight.dtype is torch.float32
            and first.bias is second.bias is None
        )


def draw(x: Tensor) -> Tensor:
    """A random number for each value of ``x``; int16, of its shape.

    Four from each of torch's: one for each value, as its own dropout takes them, took longer than
    the products.
    """
    count = x.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    return draws.view(torch.int16)[:count].view(x.shape)


def keeps(draws: Tensor, share: float, dtype: torch.dtype) -> Tensor:
    """1 for what a dropout of ``share`` keeps, to 1/65,536 of it, and 0 for what it drops.

    To multiply by: where a processor has to guess each value's branch, as ``masked_fill`` and
    ``where`` let it, it takes twenty times as long.
    """
    kept = torch.empty(draws.shape, dtype=dtype)
    return torch.ge(draws, round(share * 2**16) - 2**15, out=kept)


class _Fused(torch.autograd.Function):
    """``x @ weight.T + bias + scaling * seen @ first.T @ second.T``; weight does not train.

    ``seen`` is ``x`` times what a dropout has ``kept``; ``scaling`` makes up for the rest.
    """

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        x: Tensor,
        kept: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        first: Tensor,
        second: Tensor,
        scaling: float,
    ) -> Tensor:
        first, second = first.to(x.dtype), second.to(x.dtype)
        count = x.numel() // x.shape[-1]
        rows = products.filled_up(_rows(x))
        seen = rows if kept is None else _times(rows, _rows(kept))
        inner = products.multiply(seen, first).mul_(scaling)  # (rows, rank)
        # Filled up with zeros again in backward, x is kept once for all who saw it.
        saved = x if kept is None else seen
        whole = None
        if kept is None and _merges(seen, weight):
            whole = products.add_product(weight, second * scaling, first.t())
        ctx.save_for_backward(saved, inner, weight, first, second, kept, whole)
        ctx.scaling = scaling
        if whole is not None:
            output = products.multiply(rows, whole, bias)
        else:
            base = products.multiply(rows, weight, bias)
            output = products.add_product(base, inner, second)
        return output[:count].view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved, inner, weight, first, second, kept, whole = ctx.saved_tensors
        count = gradients[0].numel() // gradients[0].shape[-1]
        gradient = products.filled_up(_rows(gradients[0]))
        seen = products.filled_up(_rows(saved))
        of_inner = products.multiply(gradient, second.t()).mul_(ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = products.multiply(gradient, (weight if whole is None else whole).t())
            if kept is not None:
                of_seen = products.multiply(of_inner, first.t())
                of_x[:count].addcmul_(of_seen[:count], _rows(kept))
            elif whole is None:
                of_x = products.add_product(of_x, of_inner, first.t())
            of_x = of_x[:count].view(*gradients[0].shape[:-1], weight.shape[1])
        # The first factor is copied where it lies across: the smaller one is.
        of_first = products.multiply(of_inner.t(), seen.t()).float()
        of_second = products.multiply(inner.t(), gradient.t()).float().t()
        return of_x, None, None, None, of_first, of_second, None


def _times(rows: Tensor, factors: Tensor) -> Tensor:
    """``rows`` times ``factors``; zeros where there are more rows than factors."""
    product = torch.empty_like(rows)
    torch.mul(rows[: len(factors)], factors, out=product[: len(factors)])
    product[len(factors) :].zero_()
    return product


def _merges(rows: Tensor, weight: Tensor) -> bool:
    """Whether adding the adapter to the weight takes less than taking each row through it.

    The sum, kept for the way back, is then smaller than what goes into the layer and comes out.
    Not in bf16: what an adapter adds to a weight is less than the weight's last bit there.
    """
    outer, inner = weight.shape
    return weight.dtype is torch.float32 and len(rows) * (outer + inner) > outer * inner


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
