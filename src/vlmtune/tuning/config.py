"""Which parameters train, and how."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from vlmtune.config import Config

Part = Literal["vision", "projector", "language"]
PARTS: tuple[Part, ...] = ("vision", "projector", "language")


class TuningConfig(Config):
    """The recipe's ``tuning`` section.

    Attributes:
        method: ``lora`` trains adapters (Hu et al. 2021), ``full`` the weights themselves.
        rank: Rank of the adapters.
        alpha: The adapters' product is scaled by ``alpha / rank``.
        dropout: Dropout before an adapter.
        targets: Names of linear layers of the language model, or one regular expression over full
            module names; None takes the family's.
        train: Parts that a full fine-tuning trains.
        freeze: Parts taken out of ``train``.
    """

    method: Literal["lora", "full"] = "lora"
    rank: int = Field(default=64, ge=1)
    alpha: int = Field(default=16, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: tuple[str, ...] | str | None = None
    train: tuple[Part, ...] = PARTS
    freeze: tuple[Part, ...] = ()

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        if self.method == "full" and not self.trained_parts():
            raise ValueError("train less freeze leaves nothing to train")
        return self

    def trained_parts(self) -> tuple[Part, ...]:
        """Parts whose own weights a full fine-tuning changes."""
        return tuple(part for part in PARTS if part in self.train and part not in self.freeze)
