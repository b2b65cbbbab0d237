"""Asking a model every row of a split, and scoring what it said."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.data.conversation import Box, Conversation
from vlmtune.errors import UsageError
from vlmtune.evaluation.intervals import Difference, Estimate, compare, estimate
from vlmtune.evaluation.latex import Normalise, normalise_latex
from vlmtune.evaluation.metric import Array, Metric, row_statistics, statistics
from vlmtune.evaluation.metrics import find
from vlmtune.files import read_lines, to_json, write_json, write_text
from vlmtune.models.encode import IGNORED, Encoder
from vlmtune.models.generate import Generation, generate, tokens_of

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
        finished: Whether it ended by itself within the limit; None where it is not known.
        prompt_tokens: Tokens of the question; None where they are not known.
        completion_tokens: Tokens of the answer; None where they are not known.
        scores: Each metric's value of this row alone, where it says something about it.
        boxes: Boxes in what it said, in pixels of the upright image.
        truth: Boxes in the row's own answer.
    """

    id: str
    question: str
    prediction: str
    references: tuple[str, ...]
    finished: bool | None
    prompt_tokens: int | None
    completion_tokens: int | None
    scores: dict[str, float]
    boxes: tuple[Box, ...] = ()
    truth: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """A split, answered and scored.

    Attributes:
        metrics: Each metric with its interval.
        predictions: One a row, in the split's order.
        max_new_tokens: The limit that was set; None where it is not known.
        normalise: How texts were brought to one spelling before they were compared.
        details: What metrics say beside their value, by name: a confusion matrix, rows left out.
    """

    metrics: dict[str, Estimate]
    predictions: tuple[Prediction, ...]
    max_new_tokens: int | None
    normalise: Normalise = "none"
    details: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def cut_at_limit(self) -> int | None:
        """Answers that were cut at the limit; None where that is not known of all."""
        ended = [prediction.finished for prediction in self.predictions]
        return None if None in ended else ended.count(False)

    def remarks(self) -> list[str]:
        """What there is to say beside the values, a line each."""
        lines = []
        if self.cut_at_limit:
            lines.append(
                f"{self.cut_at_limit} of {len(self.predictions)} answers were cut at "
                f"{self.max_new_tokens or 'their limit of'} tokens"
            )
        if self.normalise != "none":
            lines.append(f"texts were compared in one spelling (normalise: {self.normalise})")
        for name, found in self.details.items():
            described = find(name).details
            words = described.words(found) if described else ""
            lines += [f"{name}: {words}"] * bool(words)
        return lines

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
            "cut_at_limit": self.cut_at_limit,
            "normalise": self.normalise,
            "details": self.details,
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
        return cls(
            metrics,
            predictions,
            summary["max_new_tokens"],
            summary.get("normalise", "none"),
            summary.get("details", {}),
        )


def evaluate_rows(  # noqa: PLR0913
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[Conversation],
    metrics: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    batch_rows: int = 32,
    seed: int = 0,
    normalise: Normalise = "none",
    progress: Callable[[int], None] | None = None,
    answer: Callable[..., list[Generation]] | None = None,
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
        normalise: How texts are brought to one spelling before they are compared.
        progress: Called with the number of rows answered.
        answer: What asks the model, as ``generate`` does; several processes share the rows out.

    Raises:
        UsageError: There are no rows, or none that a metric compares.
        DataError: A metric cannot be taken of these rows.
    """
    if not rows:
        raise UsageError(
            "there are no rows to evaluate on; prepare the data with --validation 0.1, or leave "
            "evaluation.before and evaluation.after off"
        )
    accepted, truths = check_rows(encoder, rows, metrics, normalise)
    limit = max_new_tokens or longest_answer(encoder, rows)
    answers = (answer or generate)(
        model, encoder, rows, max_new_tokens=limit, batch_rows=batch_rows, progress=progress
    )
    predictions = [
        Prediction(
            id=row.id,
            question=encoder.complete(row).question,
            prediction=said.text,
            references=references,
            finished=said.finished,
            prompt_tokens=said.prompt_tokens,
            completion_tokens=said.completion_tokens,
            scores={},
            boxes=said.boxes,
            truth=truth,
        )
        for row, said, truth, references in zip(rows, answers, truths, accepted, strict=True)
    ]
    return scored(predictions, metrics, limit, seed=seed, normalise=normalise)


def check_rows(
    encoder: Encoder,
    rows: Sequence[Conversation],
    metrics: Sequence[str],
    normalise: Normalise = "none",
) -> tuple[list[tuple[str, ...]], list[tuple[Box, ...]]]:
    """Acceptable texts and true boxes of rows; see ``check_metrics`` for what is refused."""
    truths = [true_boxes(row) for row in rows]
    accepted = [_accepted(encoder, row, truth) for row, truth in zip(rows, truths, strict=True)]
    check_metrics(metrics, accepted, truths, normalise)
    return accepted, truths


def check_metrics(
    names: Sequence[str],
    accepted: Sequence[Sequence[str]],
    truths: Sequence[Sequence[Box]],
    normalise: Normalise = "none",
) -> None:
    """Refuse metrics that these rows cannot have, before a model is asked.

    Raises:
        UsageError: A metric compares boxes, and no row has one.
        DataError: A metric cannot be taken of these rows.
    """
    for metric in map(find, names):
        if metric.boxes and not any(truths):
            raise UsageError(
                f"the metric {metric.name} compares boxes, and no answer of the {len(truths)} rows "
                "holds one; choose metrics of texts, such as exact_match"
            )
        if not metric.boxes:
            spell = _speller(metric, normalise)
            row_statistics(metric, [tuple(map(spell, row)) for row in accepted])


def scored(
    predictions: Sequence[Prediction],
    metrics: Sequence[str],
    max_new_tokens: int | None,
    *,
    seed: int = 0,
    normalise: Normalise = "none",
) -> Evaluation:
    """Predictions with the scores of metrics, whatever scores they had.

    Raises:
        UsageError: For an unknown metric.
        DataError: With code ``no_rows``, ``no_references``, ``no_boxes`` or ``nothing_renders``.
    """
    found: dict[str, Estimate] = {}
    details: dict[str, dict[str, Any]] = {}
    scores: list[dict[str, float]] = [{} for _ in predictions]
    for metric in map(find, metrics):
        said, known = compared(metric, predictions, normalise)
        stats = statistics(metric, said, known)
        found[metric.name] = estimate(metric, stats, seed=seed)
        if metric.details is not None:
            details[metric.name] = metric.details.of(said, known, stats)
        for row, value in zip(scores, metric.alone(stats).tolist(), strict=True):
            if not math.isnan(value):
                row[metric.name] = value
    rows = tuple(
        replace(prediction, scores=row) for prediction, row in zip(predictions, scores, strict=True)
    )
    return Evaluation(found, rows, max_new_tokens, normalise, details)


def compared(
    metric: Metric, predictions: Sequence[Prediction], normalise: Normalise = "none"
) -> tuple[list[Any], list[Any]]:
    """What a metric compares, row by row: texts in one spelling with accepted ones, or boxes."""
    if metric.boxes:
        return [each.boxes for each in predictions], [each.truth for each in predictions]
    spell = _speller(metric, normalise)
    return (
        [spell(each.prediction) for each in predictions],
        [tuple(map(spell, each.references)) for each in predictions],
    )


def statistics_of(
    metric: Metric, predictions: Sequence[Prediction], normalise: Normalise = "none"
) -> Array:
    """The numbers of every prediction, shape ``(rows, k)``."""
    return statistics(metric, *compared(metric, predictions, normalise))


def differences(
    names: Sequence[str],
    before: Sequence[Prediction],
    after: Sequence[Prediction],
    *,
    seed: int = 0,
    normalise: Normalise = "none",
) -> dict[str, Difference]:
    """Every named metric compared between two models' predictions for the same rows."""
    return {
        metric.name: compare(
            metric,
            statistics_of(metric, before, normalise),
            statistics_of(metric, after, normalise),
            seed=seed,
        )
        for metric in map(find, names)
    }


def longest_answer(encoder: Encoder, rows: Sequence[Conversation]) -> int:
    """1.5 times the tokens of the longest label, the default limit of an answer."""
    return math.ceil(1.5 * max(tokens_of(encoder, row, ask=False).trained for row in rows))


def true_boxes(row: Conversation) -> tuple[Box, ...]:
    """Boxes in a row's last answer."""
    last = row.messages[-1] if row.messages else None
    if last is None or last.role != "assistant":
        return ()
    return tuple(part for part in last.content if isinstance(part, Box))


def _speller(metric: Metric, normalise: Normalise) -> Callable[[str], str]:
    return str if normalise == "none" or metric.verbatim else normalise_latex


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
