"""Which parameters train, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from vlmtune.config import Config

Part = Literal["vision", "projector", "language"]
PARTS: tuple[Part, ...] = ("vision", "projector", "language")

ALL_LINEAR = "all-linear"

# Ways of peft to begin that write other weights into the base: what is saved would be an adapter
# for a base that nobody has.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


class LearningRates(Config):
    """Learning rates of single parts instead of ``training.learning_rate``; one schedule for all.

    Attributes:
        vision: The vision tower's highest learning rate.
        projector: The projector's.
        language: The language model's.
    """

    vision: float | None = Field(default=None, gt=0)
    projector: float | None = Field(default=None, gt=0)
    language: float | None = Field(default=None, gt=0)

    def named(self) -> dict[Part, float]:
        """The parts that have a learning rate of their own."""
        rates: dict[Part, float | None] = {
            "vision": self.vision,
            "projector": self.projector,
            "language": self.language,
        }
        return {part: rate for part, rate in rates.items() if rate is not None}


class TuningConfig(Config):
    """The recipe's ``tuning`` section.

    Attributes:
        method: ``lora`` trains adapters (Hu et al. 2021), ``dora`` their direction and a magnitude
            apart (Liu et al. 2024), ``rslora`` scales them by the root of the rank (Kalajdzievski
            2023), ``qlora`` puts them over a base in 4 bits (Dettmers et al. 2023); ``full`` trains
            the weights themselves.
        rank: Rank of the adapters.
        alpha: The adapters' product is scaled by ``alpha / rank``, with ``rslora`` by
            ``alpha / √rank``.
        dropout: Dropout before an adapter.
        init: How adapters begin; with each of these the model is unchanged at first.
        targets: Names of linear layers, ``all-linear``, or one regular expression over full module
            names; null takes the family's names. Names and ``all-linear`` mean layers of the parts
            that train.
        train: Parts that train; null: ``language`` for adapters (an expression reaches what it
            matches), all for ``full``.
        freeze: Parts taken out of ``train``, and out of an expression's reach.
        modules_to_save: Names of modules that train in full beside the adapters, e.g.
            ``embed_tokens``.
        learning_rates: Learning rates of single parts.
    """

    method: Literal["lora", "dora", "rslora", "qlora", "full"] = "lora"
    rank: int = Field(default=64, ge=1)
    alpha: int = Field(default=16, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    targets: tuple[str, ...] | str | None = None
    train: tuple[Part, ...] | None = None
    freeze: tuple[Part, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    learning_rates: LearningRates = LearningRates()

    @property
    def adapts(self) -> bool:
        """Whether adapters train, and the weights themselves stay."""
        return self.method != "full"

    def trained_parts(self) -> tuple[Part, ...]:
        """Parts that may train; those that adapters really sit in are known with the model."""
        return _trained_parts(vars(self))

    @field_validator("init", mode="before")
    @classmethod
    def _init_leaves_the_base(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith(CHANGE_THE_BASE):
            raise ValueError(
                f"{value} writes other weights into the base, and adapter + base would not be what "
                "was trained; expected default, gaussian or orthogonal"
            )
        return value

    @field_validator("init")
    @classmethod
    def _init_is_possible(cls, value: str, info: ValidationInfo) -> str:
        if value != "orthogonal":
            return value
        if info.data.get("method") == "qlora":
            raise ValueError("orthogonal cannot begin over 4 bits; expected default or gaussian")
        rank = info.data.get("rank", 2)
        if rank % 2:
            raise ValueError(f"orthogonal needs an even tuning.rank, found {rank}")
        return value

    @field_validator("targets")
    @classmethod
    def _targets_can_match(
        cls, value: tuple[str, ...] | str | None
    ) -> tuple[str, ...] | str | None:
        if value == ():
            raise ValueError("names no layer; leave it out for the family's, or give all-linear")
        if isinstance(value, str) and value != ALL_LINEAR:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression: {error}") from error
        return value

    @field_validator("train")
    @classmethod
    def _train_names_something(cls, value: tuple[Part, ...] | None) -> tuple[Part, ...] | None:
        if value == ():
            raise ValueError(f"names no part; expected some of {', '.join(PARTS)}")
        return value

    @field_validator("freeze")
    @classmethod
    def _something_trains(cls, value: tuple[Part, ...], info: ValidationInfo) -> tuple[Part, ...]:
        if info.data.keys() >= {"method", "targets", "train"} and not _trained_parts(
            {**info.data, "freeze": value}
        ):
            raise ValueError("train less freeze leaves nothing to train")
        return value

    @field_validator("modules_to_save")
    @classmethod
    def _saved_beside_adapters(
        cls, value: tuple[str, ...], info: ValidationInfo
    ) -> tuple[str, ...]:
        if value and info.data.get("method") == "full":
            raise ValueError(
                "stands beside adapters; full fine-tuning trains the parts of tuning.train whole"
            )
        return value

    @field_validator("learning_rates")
    @classmethod
    def _rates_of_what_trains(cls, value: LearningRates, info: ValidationInfo) -> LearningRates:
        if info.data.get("method") == "full" and info.data.keys() >= {"train", "freeze"}:
            fault = idle_rate(value, _trained_parts(info.data))
            if fault is not None:
                raise ValueError(fault)
        return value


def idle_rate(rates: LearningRates, trained: tuple[Part, ...]) -> str | None:
    """What is wrong with a learning rate of a part that does not train; None if there is none."""
    for part in rates.named():
        if part not in trained:
            return (
                f"the {part} part does not train, only {', '.join(trained)}; name it in "
                "tuning.train, or leave its learning rate out"
            )
    return None


def _trained_parts(values: Mapping[str, Any]) -> tuple[Part, ...]:
    targets = values["targets"]
    expression = isinstance(targets, str) and targets != ALL_LINEAR
    default = PARTS if values["method"] == "full" or expression else ("language",)
    named = default if values["train"] is None else values["train"]
    return tuple(part for part in PARTS if part in named and part not in values["freeze"])
