"""Optimizer, learning-rate schedule, precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from vlmtune.training.config import TrainingConfig

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: TrainingConfig
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); matrices decay, vectors do not."""
    matrices = [parameter for parameter in parameters.values() if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=1e-8,
    )


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step ``step`` (from 1) of ``steps``; has no state to checkpoint.

    The shapes are those of transformers' schedules of the same names: linear warm-up from 0, then
    linear to 0, half a cosine to 0, or constant.
    """
    done, warmup = step - 1, config.warmup(steps)
    if done < warmup:
        return config.learning_rate * done / max(1, warmup)
    progress = (done - warmup) / max(1, steps - warmup)
    factors = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "constant": 1.0,
    }
    return config.learning_rate * max(0.0, factors[config.schedule])


def autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """The number format of the matrix products."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[config.precision])


def make_scaler(config: TrainingConfig, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling, which fp16 needs: its smallest numbers are too large for gradients."""
    return torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
