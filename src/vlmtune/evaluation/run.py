"""Asking a model every row of a split, and scoring what it said."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.data.conversation import Box, Conversation
from vlmtune.errors import UsageError
from vlmtune.evaluation.intervals import Difference, Estimate, compare, estimate
from vlmtune.evaluation.metrics import Array, Metric, alone, find, statistics
from vlmtune.files import read_lines, to_json, write_json, write_text
from vlmtune.models.encode import IGNORED, Encoder
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
        boxes: Boxes in what it said, in pixels of the upright image.
        truth: Boxes in the row's own answer.
    """

    id: str
    question: str
    prediction: str
    references: tuple[str, ...]
    finished: bool
    prompt_tokens: int
    completion_tokens: int
    scores: dict[str, float]
    boxes: tuple[Box, ...] = ()
    truth: tuple[Box, ...] = ()


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
        predictions = tuple(map(_prediction, read_lines(folder / PREDICTIONS)))
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
    truths = [_boxes(row) for row in rows]
    for metric in map(find, metrics):
        if metric.boxes and not any(truths):
            raise UsageError(
                f"the metric {metric.name} compares boxes, and no answer of the {len(rows)} rows "
                "holds one; choose metrics of texts, such as exact_match"
            )
    limit = max_new_tokens or longest_answer(encoder, rows)
    answers = generate(
        model, encoder, rows, max_new_tokens=limit, batch_rows=batch_rows, progress=progress
    )
    predictions = [
        Prediction(
            id=row.id,
            question=encoder.complete(row).question,
            prediction=answer.text,
            references=_accepted(encoder, row, truth),
            finished=answer.finished,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            scores={},
            boxes=answer.boxes,
            truth=truth,
        )
        for row, answer, truth in zip(rows, answers, truths, strict=True)
    ]
    return scored(predictions, metrics, limit, seed=seed)


def scored(
    predictions: Sequence[Prediction], metrics: Sequence[str], max_new_tokens: int, *, seed: int = 0
) -> Evaluation:
    """Predictions with the scores of metrics, whatever scores they had.

    Raises:
        UsageError: For an unknown metric.
        DataError: With code ``no_rows``, ``no_references`` or ``no_boxes``.
    """
    stats = {metric.name: statistics_of(metric, predictions) for metric in map(find, metrics)}
    rows = {name: alone(find(name), found) for name, found in stats.items()}
    return Evaluation(
        {name: estimate(find(name), found, seed=seed) for name, found in stats.items()},
        tuple(
            replace(prediction, scores={name: rows[name][index] for name in metrics})
            for index, prediction in enumerate(predictions)
        ),
        max_new_tokens,
    )


def statistics_of(metric: Metric, predictions: Sequence[Prediction]) -> Array:
    """Sufficient statistics of every prediction, shape ``(rows, k)``."""
    if metric.boxes:
        return statistics(
            metric, [each.boxes for each in predictions], [each.truth for each in predictions]
        )
    return statistics(
        metric, [each.prediction for each in predictions], [each.references for each in predictions]
    )


def differences(
    names: Sequence[str], before: Sequence[Prediction], after: Sequence[Prediction]
) -> dict[str, Difference]:
    """Every named metric compared between two models' predictions for the same rows."""
    return {
        metric.name: compare(
            metric, statistics_of(metric, before), statistics_of(metric, after), seed=0
        )
        for metric in map(find, names)
    }


def longest_answer(encoder: Encoder, rows: Sequence[Conversation]) -> int:
    """1.5 times the tokens of the longest label, the default limit of an answer."""
    return math.ceil(1.5 * max(tokens_of(encoder, row, ask=False).trained for row in rows))


def _boxes(row: Conversation) -> tuple[Box, ...]:
    """Boxes in a row's last answer."""
    last = row.messages[-1] if row.messages else None
    if last is None or last.role != "assistant":
        return ()
    return tuple(part for part in last.content if isinstance(part, Box))


def _accepted(encoder: Encoder, row: Conversation, truth: Sequence[Box]) -> tuple[str, ...]:
    """Every acceptable answer as text; of an answer with boxes, what the model would write."""
    if row.references or not truth:
        return row.references or (row.answer,)
    asked = len(tokens_of(encoder, row, ask=True))
    labels = tokens_of(encoder, row, ask=False).labels[asked:]
    spoken = [int(label) for label in labels if label not in (IGNORED, encoder.end_id)]
    tokenizer = encoder.family.parts.tokenizer
    return (str(tokenizer.decode(spoken, skip_special_tokens=True)),)


def _prediction(record: dict[str, Any]) -> Prediction:
    """A stored prediction; those of earlier versions have no boxes."""
    boxes = {
        name: tuple(Box(**{**box, "xyxy": tuple(box["xyxy"])}) for box in record.get(name, ()))
        for name in ("boxes", "truth")
    }
    return Prediction(**{**record, "references": tuple(record["references"]), **boxes})
