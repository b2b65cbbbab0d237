"""Float32 masters of bfloat16 weights: Muon for the hidden matrices, AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CLIP = 1.0


class Masters:
    """The weights that are stepped; the model computes with rounded copies of them.

    Args:
        model: In bfloat16 (or any other type).
        rate: Muon's learning rate (Jordan et al. 2024).
        other_rate: AdamW's.
    """

    def __init__(self, model: nn.Module, rate: float, other_rate: float) -> None:
        self._weights = dict(model.named_parameters())
        self._masters = {
            name: nn.Parameter(_flat(weight.detach()).float().clone())
            for name, weight in self._weights.items()
        }
        hidden = [name for name, master in self._masters.items() if _is_hidden(name, master)]
        others = [name for name in self._masters if name not in hidden]
        self._rates = (rate, other_rate)
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                [self._masters[name] for name in hidden], lr=rate, weight_decay=0.01, momentum=0.95
            ),
            torch.optim.AdamW(
                [self._masters[name] for name in others],
                lr=other_rate,
                betas=(0.9, 0.95),
                weight_decay=0.0,
            ),
        )

    def step(self, factor: float) -> None:
        """Step by the gradients that lie at the model's weights, and clear them.

        Args:
            factor: Share of the learning rates to use.
        """
        for name, master in self._masters.items():
            gradient = self._weights[name].grad
            master.grad = None if gradient is None else _flat(gradient).float()
            self._weights[name].grad = None
        nn.utils.clip_grad_norm_(self._masters.values(), CLIP)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = factor * rate
            optimizer.step()
        self._copy()

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "weights": {name: master.detach() for name, master in self._masters.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        weights: dict[str, Tensor] = state["weights"]
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(weights[name])
        for optimizer, stored in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self._copy()

    @torch.no_grad()
    def _copy(self) -> None:
        for name, master in self._masters.items():
            self._weights[name].copy_(master.view_as(self._weights[name]))


def _flat(weight: Tensor) -> Tensor:
    """The patch embedding's kernel as the matrix it is: its stride is its size."""
    return weight.flatten(1) if weight.ndim > 2 else weight


def _is_hidden(name: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
