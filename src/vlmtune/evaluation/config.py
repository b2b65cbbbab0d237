"""The recipe's ``evaluation`` section."""

from __future__ import annotations

from pydantic import Field, field_validator

from vlmtune.config import Config
from vlmtune.errors import UsageError
from vlmtune.evaluation.latex import Normalise


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
