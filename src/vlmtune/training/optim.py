"""Optimizer, learning-rate schedule, precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from vlmtune.training.config import TrainingConfig

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    config: TrainingConfig,
    rates: Mapping[str, float] | None = None,
    *,
    fused: bool = False,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); matrices decay, vectors do not.

    Args:
        parameters: What trains, by name.
        config: The recipe's ``training``.
        rates: The highest learning rate of each parameter; None: ``config.learning_rate`` for all.
        fused: All of a parameter's update in one kernel: a third of the time on a CPU.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        rate, decays = (rates or {}).get(name, config.learning_rate), parameter.dim() >= 2
        decay = config.weight_decay if decays else 0.0
        empty = {"params": [], "weight_decay": decay, "lr": rate, "highest_lr": rate}
        groups.setdefault((rate, decays), empty)["params"].append(parameter)
    options: dict[str, Any] = {"betas": config.betas, "eps": 1e-8, "fused": fused or None}
    return torch.optim.AdamW(list(groups.values()), **options)


def fuses(device: torch.device) -> bool:
    """Whether a device has the fused AdamW."""
    return device.type in ("cpu", "cuda")


def set_learning_rates(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, step: int, steps: int
) -> None:
    """Give each group of parameters its learning rate of a step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, steps, group["highest_lr"])


def learning_rate(
    config: TrainingConfig, step: int, steps: int, highest: float | None = None
) -> float:
    """Learning rate of optimizer step ``step`` (from 1) of ``steps``; has no state to checkpoint.

    The shapes are those of transformers' schedules of the same names: linear warm-up from 0, then
    linear to 0, half a cosine to 0, or constant.

    Args:
        config: The recipe's ``training``.
        step: The step's number.
        steps: Steps of the run.
        highest: Learning rate after the warm-up; None: ``config.learning_rate``.
    """
    highest = config.learning_rate if highest is None else highest
    done, warmup = step - 1, config.warmup(steps)
    if done < warmup:
        return highest * done / max(1, warmup)
    progress = (done - warmup) / max(1, steps - warmup)
    factors = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "constant": 1.0,
    }
    return highest * max(0.0, factors[config.schedule])


def autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """The number format of the matrix products."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[config.precision])


def make_scaler(config: TrainingConfig, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling, which fp16 needs: its smallest numbers are too large for gradients."""
    return torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
