"""The recipe's ``training`` section."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from vlmtune.config import Config

Precision = Literal["fp32", "bf16", "fp16"]


class TrainingConfig(Config):
    """How the weights move.

    Attributes:
        epochs: Times each row is trained.
        max_steps: Optimizer steps instead of epochs.
        batch_size: Rows per optimizer step. How a step is cut into forwards is the planner's
            business and does not change the result.
        learning_rate: The highest learning rate of the schedule.
        schedule: What follows the warm-up.
        warmup_steps: Steps of linear warm-up; stands above ``warmup_ratio``.
        warmup_ratio: Warm-up as a part of all steps.
        weight_decay: AdamW's decay of matrices; vectors (norms, biases) do not decay.
        betas: AdamW's averaging of gradients and of their squares.
        clip: Largest norm of a step's gradient; 0 turns clipping off.
        precision: Number format of the matrix products.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping
            them: a third more computing, far less memory. ``auto`` does so where the forecast says
            that the run would not fit otherwise, and for the part of the model where it costs
            least. No result changes.
        compile: Compile the language model's layers (``torch.compile``). Other kernels round
            otherwise; the first steps take minutes.
        seed: Seed of the order of rows, of new weights and of dropout.
        log_steps: Optimizer steps between two lines of progress.
        save_steps: Optimizer steps between two checkpoints.
        save_behind: Go on training while a checkpoint is written. It is copied to the memory of the
            CPU first: its size is needed there.
        keep: Newest checkpoints to keep; the best one stays besides.
        token_budget: Most tokens of one forward; None: by device. It halves where memory ends.
        rehearse: Try the largest forward before the first step, so that memory does not end late;
            None: on a GPU.
        workers: Threads that decode and encode ahead of the model.
        vision_cache: Where to keep what a frozen vision tower makes of images, so that it looks at
            each once: ``memory``; ``disk``, for later runs too; ``auto`` takes memory where images
            are seen twice and it is possible; ``off``.
        vision_cache_gb: Most to keep there, in GB (10⁹ bytes); on disk, of all runs together.
    """

    epochs: float = Field(default=1, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(default=1.0, ge=0)
    precision: Precision = "bf16"
    gradient_checkpointing: Literal["auto", True, False] = "auto"
    compile: bool = False
    seed: int = Field(default=42, ge=0)
    log_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(default=100, ge=1)
    save_behind: bool = True
    keep: int = Field(default=3, ge=1)
    token_budget: int | None = Field(default=None, ge=1)
    rehearse: bool | None = None
    workers: int = Field(default=2, ge=0)
    vision_cache: Literal["auto", "off", "memory", "disk"] = "auto"
    vision_cache_gb: float = Field(default=8, gt=0)

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a run of ``steps`` optimizer steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(self.warmup_ratio * steps)
