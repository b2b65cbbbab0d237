"""Asking a model every row of a split, and scoring what it said."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.data.conversation import Conversation
from vlmtune.errors import UsageError
from vlmtune.evaluation.intervals import Estimate, score
from vlmtune.evaluation.metrics import row_scores
from vlmtune.files import read_lines, to_json, write_json, write_text
from vlmtune.models.encode import Encoder
from vlmtune.models.generate import generate, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREDICTIONS = "predictions.jsonl"
METRICS = "metrics.json"


@dataclass(frozen=True)
class Prediction:
    """What a model said to one row.

    Attributes:
        id: The row's id.
        question: What was asked, as the model saw it.
        prediction: What it said.
        references: Every acceptable answer.
        finished: Whether it ended by itself within the limit.
        prompt_tokens: Tokens of the question.
        completion_tokens: Tokens of the answer.
        scores: Each metric's value of this row alone.
    """

    id: str
    question: str
    prediction: str
    references: tuple[str, ...]
    finished: bool
    prompt_tokens: int
    completion_tokens: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """A split, answered and scored.

    Attributes:
        metrics: Each metric with its interval.
        predictions: One a row, in the split's order.
        max_new_tokens: The limit that was set.
    """

    metrics: dict[str, Estimate]
    predictions: tuple[Prediction, ...]
    max_new_tokens: int

    def metrics_json(self) -> dict[str, dict[str, float]]:
        """``{name: {value, low, high}}``."""
        return {name: asdict(estimate) for name, estimate in self.metrics.items()}

    def write(self, folder: Path) -> None:
        """Write predictions and metrics into a folder that appears at once."""
        temporary = folder.with_name(f".{folder.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        lines = (to_json(asdict(prediction), indent=None) for prediction in self.predictions)
        write_text(temporary / PREDICTIONS, "".join(line + "\n" for line in lines))
        summary: dict[str, Any] = {
            "metrics": self.metrics_json(),
            "samples": len(self.predictions),
            "max_new_tokens": self.max_new_tokens,
        }
        write_json(temporary / METRICS, summary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    @classmethod
    def read(cls, folder: Path) -> Evaluation | None:
        """Read what ``write`` wrote, or None if there is nothing."""
        if not (folder / METRICS).is_file():
            return None
        summary = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        predictions = tuple(
            Prediction(**{**record, "references": tuple(record["references"])})
            for record in read_lines(folder / PREDICTIONS)
        )
        metrics = {name: Estimate(**value) for name, value in summary["metrics"].items()}
        return cls(metrics, predictions, summary["max_new_tokens"])


def evaluate_rows(  # noqa: PLR0913
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[Conversation],
    metrics: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    batch_rows: int = 32,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Answer and score rows; greedy, so that the same model says the same again.

    Args:
        model: The model, adapters inside.
        encoder: Its encoder.
        rows: Rows with answers.
        metrics: Names of metrics.
        max_new_tokens: Longest answer; None takes 1.5 times the longest label of the rows.
        batch_rows: Questions answered at once.
        seed: Of the intervals' resampling.
        progress: Called with the number of rows answered.
    """
    if not rows:
        raise UsageError(
            "there are no rows to evaluate on; prepare the data with --validation 0.1, or leave "
            "evaluation.before and evaluation.after off"
        )
    limit = max_new_tokens or longest_answer(encoder, rows)
    answers = generate(
        model, encoder, rows, max_new_tokens=limit, batch_rows=batch_rows, progress=progress
    )
    texts = [answer.text for answer in answers]
    references = [row.references or (row.answer,) for row in rows]
    alone = row_scores(metrics, texts, references)
    predictions = tuple(
        Prediction(
            id=row.id,
            question=encoder.complete(row).question,
            prediction=answer.text,
            references=tuple(accepted),
            finished=answer.finished,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            scores={name: alone[name][index] for name in metrics},
        )
        for index, (row, answer, accepted) in enumerate(zip(rows, answers, references, strict=True))
    )
    return Evaluation(score(metrics, texts, references, seed=seed), predictions, limit)


def longest_answer(encoder: Encoder, rows: Sequence[Conversation]) -> int:
    """1.5 times the tokens of the longest label, the default limit of an answer."""
    return math.ceil(1.5 * max(tokens_of(encoder, row, ask=False).trained for row in rows))
