"""The recipe's ``distributed`` section."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from vlmtune.config import Config

StrategyName = Literal["ddp", "fsdp2", "zero2", "zero3"]


class DistributedConfig(Config):
    """How several processes hold the weights; a single process holds them all.

    Attributes:
        strategy: ``ddp``: each holds everything. ``fsdp2``: weights, gradients and optimizer are
            cut among them (PyTorch's ``fully_shard``). ``zero2``: gradients and optimizer are,
            ``zero3``: the weights too (DeepSpeed, an extra).
        offload: Keep what is cut in the memory of the CPU between its uses.
    """

    strategy: StrategyName = "ddp"
    offload: bool = False

    @property
    def cuts(self) -> bool:
        """Whether processes hold different parts of something, and so train in step."""
        return self.strategy != "ddp"

    @property
    def cuts_weights(self) -> bool:
        """Whether they hold different parts of the weights."""
        return self.strategy in ("fsdp2", "zero3")

    @property
    def zero(self) -> bool:
        """Whether DeepSpeed holds them."""
        return self.strategy in ("zero2", "zero3")

    @model_validator(mode="after")
    def _offloads_what_is_cut(self) -> Self:
        if self.offload and not self.cuts:
            raise ValueError(
                "offload: with ddp every process keeps everything on its device; use fsdp2, zero2 "
                "or zero3"
            )
        return self
