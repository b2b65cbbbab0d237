"""What a finished run says about itself: result, report, model card."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlmtune.data.conversation import Conversation
from vlmtune.data.mixture import open_recorded
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.intervals import Difference
from vlmtune.evaluation.model_card import write_model_card
from vlmtune.evaluation.report import write_report
from vlmtune.evaluation.report_content import ReportContent, ReportRow
from vlmtune.evaluation.run import Evaluation, Prediction, differences
from vlmtune.files import read_lines
from vlmtune.runs.folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def write_summary(folder: RunFolder) -> ReportContent:
    """Write ``report.html`` and ``README.md`` from what lies in the run's folder.

    Everything is read back from the files, so that a report can be made again at any time.
    """
    content = report_content(folder)
    write_report(folder.report, content)
    write_model_card(folder.card, content)
    return content


def report_content(folder: RunFolder) -> ReportContent:
    """Everything that the report of a run says."""
    recipe_yaml = folder.recipe.read_text(encoding="utf-8")
    recipe = yaml.safe_load(recipe_yaml)
    data = _read_json(folder.data)
    before = Evaluation.read(folder.evaluation("before"))
    after = Evaluation.read(folder.evaluation("after"))
    contract = _read_json(folder.contract)
    primary = recipe["evaluation"]["metrics"][0]
    return ReportContent(
        title=recipe["name"],
        recipe_yaml=recipe_yaml,
        environment=_read_json(folder.environment),
        data={key: value for key, value in data.items() if key != "ledger"},
        steps=_steps(folder),
        before=before.metrics if before else None,
        after=after.metrics if after else None,
        differences=_differences(before, after),
        rows=_rows(data, before, after, primary),
        ledger=account(folder),
        totals=totals(folder),
        reproduce=shlex.join(
            ["vlmtune", "train", str(folder.recipe), "--run", f"{folder.path}-again"]
        ),
        contract=contract,
        base_model=contract["base"]["id"],  # of a folder the whole path, which no hub id looks like
        method=recipe["tuning"]["method"],
        primary=primary,
    )


def account(folder: RunFolder) -> dict[str, Any]:
    """Where every row that came in went; the numbers sum to ``in`` exactly.

    They do not where the ledger names more rows than the data has: the report then says so.
    """
    data = _read_json(folder.data)
    trained: set[str] = set()
    skipped: set[str] = set()
    left_out: dict[str, str] = {}
    for record in read_lines(folder.ledger):
        if record["event"] == "trained":
            trained.update(record["ids"])
        elif record["event"] == "skipped_step":
            skipped.update(record["ids"])
        elif record["event"] == "dropped":
            left_out[record["id"]] = record["code"]
    # What was trained before a changed plan left it out was trained all the same.
    skipped -= trained
    dropped = Counter(code for row, code in left_out.items() if row not in trained | skipped)
    train, validation = data["splits"]["train"], data["splits"]["validation"]
    quarantined: dict[str, int] = data["quarantined"]
    return {
        "in": train + validation + sum(quarantined.values()),
        "trained": len(trained),
        "skipped": len(skipped),  # only in steps that were not applied
        "not_reached": max(0, train - len(trained) - len(skipped) - dropped.total()),
        "validation": validation,
        "dropped": dict(dropped),
        "quarantined": quarantined,
    }


def totals(folder: RunFolder) -> dict[str, float]:
    """Steps, samples, tokens and seconds of the training itself."""
    steps = list(read_lines(folder.metrics))
    seconds = sum(record["seconds"] for record in steps)
    samples = sum(record["samples"] for record in steps)
    peak = max((record.get("peak_memory_bytes", 0) for record in steps), default=0)
    return {
        "steps": len(steps),
        "samples": samples,
        "tokens": sum(record["tokens"] for record in steps),
        "label_tokens": sum(record["labels"] for record in steps),
        "seconds": seconds,
        "samples_per_second": samples / seconds if seconds else 0.0,
        "peak_memory_bytes": peak,
    }


def _steps(folder: RunFolder) -> list[dict[str, Any]]:
    records = []
    for record in read_lines(folder.metrics):
        seconds = record["seconds"]
        rates = {
            "samples_per_second": record["samples"] / seconds if seconds else None,
            "tokens_per_second": record["tokens"] / seconds if seconds else None,
        }
        records.append({**record, **rates})
    return records


def _differences(
    before: Evaluation | None, after: Evaluation | None
) -> dict[str, Difference] | None:
    """After compared with before, over the rows that both answered."""
    if before is None or after is None:
        return None
    earlier = {prediction.id: prediction for prediction in before.predictions}
    pairs = [(earlier[later.id], later) for later in after.predictions if later.id in earlier]
    if not pairs:
        return None
    return differences(
        [name for name in after.metrics if name in before.metrics],
        # The truth is the later one's, should the rows have changed.
        [replace(first, references=later.references, truth=later.truth) for first, later in pairs],
        [later for _, later in pairs],
    )


def _rows(
    data: Mapping[str, Any],
    before: Evaluation | None,
    after: Evaluation | None,
    primary: str,
) -> list[ReportRow]:
    answered = after or before
    if answered is None:
        return []
    wanted = {prediction.id for prediction in answered.predictions}
    pictures = {
        row.id: row.images[0].data for row in _validation(data) if row.id in wanted and row.images
    }
    first, second = _by_id(before), _by_id(after)
    return [
        ReportRow(
            id=prediction.id,
            question=prediction.question,
            truth=prediction.references,
            before=first[prediction.id].prediction if prediction.id in first else None,
            after=second[prediction.id].prediction if prediction.id in second else None,
            score_before=_score(first, prediction.id, primary),
            score_after=_score(second, prediction.id, primary),
            image=pictures.get(prediction.id),
        )
        for prediction in answered.predictions
    ]


def _validation(data: Mapping[str, Any]) -> Sequence[Conversation]:
    """The validation rows, or none if the dataset has moved: a report is written all the same."""
    try:
        dataset = open_recorded(data)
    except VlmtuneError:  # a part of it has moved
        return ()
    # Where other data lies now, a row of the same id may show another picture.
    if dataset is None or dataset.fingerprint != data["fingerprint"]:
        return ()
    return dataset.split("validation")


def _by_id(evaluation: Evaluation | None) -> Mapping[str, Prediction]:
    if evaluation is None:
        return {}
    return {prediction.id: prediction for prediction in evaluation.predictions}


def _score(predictions: Mapping[str, Prediction], row: str, metric: str) -> float | None:
    return predictions[row].scores.get(metric) if row in predictions else None


def _read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
