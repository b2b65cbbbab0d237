"""The recipe's ``evaluation`` section."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from vlmtune.config import Config
from vlmtune.errors import UsageError
from vlmtune.evaluation.latex import Normalise
from vlmtune.runs.best import PROBE_LOSS, best_by


class EvaluationConfig(Config):
    """What is measured, and when.

    Attributes:
        before: Answer the validation rows with the base, before training.
        after: Answer them again with what was trained.
        metrics: Names of the metrics; the first is the headline.
        normalise: How texts are brought to one spelling before they are compared: ``latex`` undoes
            differences of spelling that a formula's print does not show; ``none`` compares them as
            they are.
        every: Optimizer steps between two measurements of the probe's loss; None: at each save.
        generate_every: Optimizer steps between two times that the probe's questions are answered
            and the metrics taken of them; None: never.
        best_metric: What the best checkpoint is best by: ``probe_loss``, or one of the metrics,
            which needs ``generate_every``. It is never pruned, and is what is evaluated, merged and
            served of the run. None: the newest is, and where ``stop_after`` is set, the one with
            the lowest probe loss.
        stop_after: Measurements of ``best_metric`` in a row without a better one, after which the
            training ends; None: it runs to its end.
        probe: Validation rows whose loss is followed during training.
        max_new_tokens: Longest answer in tokens; None: 1.5 times the longest label.
        limit: Evaluate only the first rows of the validation split.
        batch_rows: Questions answered at once.
    """

    before: bool = True
    after: bool = True
    metrics: tuple[str, ...] = ("exact_match", "edit_similarity", "cer", "bleu")
    normalise: Normalise = "none"
    every: int | None = Field(default=None, ge=1)
    generate_every: int | None = Field(default=None, ge=1)
    best_metric: str | None = None
    stop_after: int | None = Field(default=None, ge=1)
    probe: int = Field(default=32, ge=0)
    max_new_tokens: int | None = Field(default=None, ge=1)
    limit: int | None = Field(default=None, ge=1)
    batch_rows: int = Field(default=32, ge=1)

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from vlmtune.evaluation.metrics import find

        if not names:
            raise ValueError("expected at least one metric")
        for name in names:
            try:
                find(name)
            except UsageError as error:
                raise ValueError(str(error)) from error
        return names

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        by_answers = self.best_metric not in (None, PROBE_LOSS)
        if by_answers and self.best_metric not in self.metrics:
            raise ValueError(
                f"best_metric: found {self.best_metric!r}, expected probe_loss or one of metrics: "
                f"{', '.join(self.metrics)}"
            )
        if by_answers and self.generate_every is None:
            raise ValueError(
                f"best_metric: {self.best_metric} is not measured during training; set "
                "generate_every to the steps between two measurements"
            )
        if (self.stop_after or self.best_metric) and not self.probe:
            raise ValueError("probe: 0 rows cannot say which step is best; expected at least 1")
        return self

    @property
    def best_by(self) -> str | None:
        """What the checkpoint that stands for a run is best by; None: the newest one does."""
        return best_by(self.model_dump(include={"best_metric", "stop_after"}))
