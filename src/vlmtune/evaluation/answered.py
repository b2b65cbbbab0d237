"""From evaluations to what a report says of them: metrics, rows, slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlmtune.data.conversation import Conversation
from vlmtune.errors import UsageError
from vlmtune.evaluation.intervals import Difference
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.report_content import (
    MOST_PICTURES,
    Answers,
    ReportContent,
    ReportRow,
    chosen,
)
from vlmtune.evaluation.run import Evaluation, Prediction, differences
from vlmtune.evaluation.slices import row_facts, slicings

MACRO_F1 = "macro_f1"


def with_answers(
    content: ReportContent,
    before: Evaluation | None,
    after: Evaluation | None,
    rows: Sequence[Conversation],
    slices: Sequence[str] = (),
) -> ReportContent:
    """A report's content with everything that evaluations say.

    Args:
        content: What else there is to say; its ``primary`` metric ranks the rows.
        before: The answers before training, if there are any.
        after: The answers after training, if there are any.
        rows: The rows that were asked, and perhaps others; empty if they are not there any more.
        slices: Columns of the rows' ``meta`` to slice by, as ``meta.KEY``.

    Raises:
        UsageError: If no row has a column of ``slices``.
    """
    known = {"before": before, "after": after}
    content = replace(
        content,
        before=before.metrics if before else None,
        after=after.metrics if after else None,
        differences=compared(before, after),
        answers={when: answers_of(each) for when, each in known.items() if each is not None},
        rows=_rows(before, after, content.primary),
    )
    if after is None and before is None:
        return content
    wanted = {row.id: row for row in content.rows}
    shown = {row.id for each in chosen(content).values() for row in each}
    facts, pictures = {}, {}
    for row in rows:  # one after the other: all of them do not fit into memory
        if row.id in wanted:
            facts[row.id] = row_facts(row, wanted[row.id].truth)
        if row.id in shown:
            pictures[row.id] = [image.data for image in row.images]
    if slices and not facts:
        raise UsageError(
            "--slices: the rows that were evaluated are not there any more (the data moved or "
            "changed), so that their columns are not known"
        )
    return replace(
        content,
        rows=[_pictured(row, pictures.get(row.id, ())) for row in content.rows],
        slicings=slicings(content.metrics[0], before, after, facts, slices),
    )


def compared(
    before: Evaluation | None, after: Evaluation | None, only: Sequence[str] | None = None
) -> dict[str, Difference] | None:
    """After compared with before, over the rows that both answered.

    Args:
        before: The earlier answers.
        after: The later ones.
        only: Names of metrics; None: all that both have.

    Returns:
        Each metric's difference; None if there is nothing to compare.
    """
    if before is None or after is None:
        return None
    earlier = {prediction.id: prediction for prediction in before.predictions}
    pairs = [(earlier[later.id], later) for later in after.predictions if later.id in earlier]
    if not pairs:
        return None
    return differences(
        [name for name in only or after.metrics if name in before.metrics],
        # The truth is the later one's, should the rows have changed.
        [replace(first, references=later.references, truth=later.truth) for first, later in pairs],
        [later for _, later in pairs],
        normalise=after.normalise,
    )


def answers_of(evaluation: Evaluation) -> Answers:
    """What is known of all answers of an evaluation, beside its metrics."""
    remarks = []
    if evaluation.normalise != "none":
        remarks.append(f"texts were brought to one spelling first ({evaluation.normalise}).")
    for name, found in evaluation.details.items():
        described = find(name).details
        words = described.words(found) if described else ""
        remarks += [f"{name}: {words}."] if words else []
    tokens = [prediction.completion_tokens for prediction in evaluation.predictions]
    known = [number for number in tokens if number is not None]
    return Answers(
        rows=len(evaluation.predictions),
        cut=evaluation.cut_at_limit,
        limit=evaluation.max_new_tokens,
        tokens=sum(known) if len(known) == len(tokens) else None,
        remarks=remarks,
        confusion=evaluation.details.get(MACRO_F1, {}),
    )


def _rows(before: Evaluation | None, after: Evaluation | None, primary: str) -> list[ReportRow]:
    first, second = _by_id(before), _by_id(after)
    return [
        ReportRow(
            id=answered.id,
            question=answered.question,
            truth=answered.references,
            before=_text(first.get(answered.id)),
            after=_text(second.get(answered.id)),
            score_before=_score(first.get(answered.id), primary),
            score_after=_score(second.get(answered.id), primary),
            cut_before=_cut(first.get(answered.id)),
            cut_after=_cut(second.get(answered.id)),
            true_boxes=answered.truth,
            boxes_before=first[answered.id].boxes if answered.id in first else (),
            boxes_after=second[answered.id].boxes if answered.id in second else (),
        )
        for answered in (second or first).values()
    ]


def _by_id(evaluation: Evaluation | None) -> Mapping[str, Prediction]:
    return {row.id: row for row in evaluation.predictions} if evaluation is not None else {}


def _text(prediction: Prediction | None) -> str | None:
    return None if prediction is None else prediction.prediction


def _score(prediction: Prediction | None, metric: str) -> float | None:
    return None if prediction is None else prediction.scores.get(metric)


def _cut(prediction: Prediction | None) -> bool:
    return prediction is not None and prediction.finished is False


def _pictured(row: ReportRow, pictures: Sequence[bytes]) -> ReportRow:
    return replace(row, images=tuple(pictures[:MOST_PICTURES]), pictures=len(pictures))
