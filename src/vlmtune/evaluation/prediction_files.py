"""Predictions that were made elsewhere: ours of an earlier run, or another engine's.

A file is JSON lines, a JSON list or a CSV table with ``id`` and ``prediction``. It may also say
``boxes`` (``label`` and ``xyxy`` in pixels of the upright picture, and ``image``, 0 unless given),
``finished``, ``prompt_tokens`` and ``completion_tokens``, as our own ``predictions.jsonl`` does.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlmtune.data.conversation import Box, Conversation
from vlmtune.errors import DataError, RefusedError, UsageError
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.run import Prediction, true_boxes

_Value = TypeVar("_Value")

SHOWN = 10  # ids in a message
OPTION = "--predictions"


def read_predictions(
    path: Path, rows: Sequence[Conversation], known: set[str], metrics: Sequence[str]
) -> list[Prediction]:
    """A file's predictions for rows, in the order of the rows; without scores.

    Args:
        path: The file.
        rows: The rows that are asked for.
        known: Ids of all rows that the file may speak of.
        metrics: What will be measured: boxes must be given where boxes are compared.

    Raises:
        UsageError: The file is not there, or does not hold what a metric compares.
        DataError: With code ``bad_prediction``, naming the line.
        RefusedError: Predictions are missing, twice there, or of rows that the data does not have.
    """
    records: dict[str, dict[str, Any]] = {}
    twice: list[str] = []
    for where, record in _records(path):
        name, _ = _checked(where, record)
        if name in records:
            twice.append(name)
        records[name] = {**record, "where": where}
    wanted = {row.id for row in rows}
    faults = [
        _named("has no prediction for", [row.id for row in rows if row.id not in records]),
        _named("has predictions for rows that the data does not have:", sorted({*records} - known)),
        _named("has more than one prediction for", sorted(set(twice) & (wanted | known))),
    ]
    if any(faults):
        raise RefusedError(f"{OPTION}: {path} {'; '.join(fault for fault in faults if fault)}")
    boxes = [metric.boxes for metric in map(find, metrics)]
    if any(boxes) and not any("boxes" in record for record in records.values()):
        raise UsageError(
            f"{OPTION}: {path} holds no boxes, which {metrics[boxes.index(True)]} compares; give "
            'each row "boxes": [{"label": …, "xyxy": [x1, y1, x2, y2]}] in pixels of the picture'
        )
    return [_prediction(row, records[row.id], texts=not all(boxes)) for row in rows]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each record stands, and the record."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"{OPTION}: there is no file {path}") from error
    except UnicodeDecodeError as error:
        raise _bad(str(path), f"no UTF-8 text ({error})") from error
    if path.suffix.lower() == ".csv":
        table = csv.DictReader(io.StringIO(text, newline=""))
        for row in table:
            yield f"{path}:{table.line_num}", {str(name): cell for name, cell in row.items()}
    elif path.suffix.lower() == ".json":
        listed = _parsed(str(path), text)
        for number, record in enumerate(listed if isinstance(listed, list) else [listed]):
            yield f"{path}, entry {number} (counted from 0)", record
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", _parsed(f"{path}:{number}", line)


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _bad(where, f"no JSON ({error})") from error


def _checked(where: str, record: Any) -> tuple[str, str]:
    if not isinstance(record, dict):
        raise _bad(where, f"{type(record).__name__} instead of an object")
    name, said = record.get("id"), record.get("prediction")
    if not isinstance(name, str | int) or not isinstance(said, str):
        raise _bad(where, f"the keys {', '.join(map(str, record)) or 'nothing'}")
    record["id"] = str(name)
    return record["id"], said


def _named(what: str, ids: Sequence[str]) -> str:
    if not ids:
        return ""
    more = f" and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else ""
    return f"{what} {', '.join(ids[:SHOWN])}{more}"


def _prediction(row: Conversation, record: dict[str, Any], *, texts: bool) -> Prediction:
    truth = true_boxes(row)
    stored = tuple(map(str, record.get("references") or ()))
    references = row.references or (stored if truth and stored else (row.answer,))
    if texts and truth and not row.references and not stored:
        raise UsageError(
            f"{OPTION}: the answer of row {row.id} holds boxes, and how a model writes them is its "
            "family's; choose metrics that compare boxes"
        )
    return Prediction(
        id=row.id,
        question=_of(str, record.get("question")) or row.question,
        prediction=record["prediction"],
        references=references,
        finished=_of(bool, record.get("finished")),
        prompt_tokens=_of(int, record.get("prompt_tokens")),
        completion_tokens=_of(int, record.get("completion_tokens")),
        scores={},
        boxes=tuple(_box(record["where"], box) for box in record.get("boxes") or ()),
        truth=truth,
    )


def _of(kind: type[_Value], value: Any) -> _Value | None:
    """A value of that type, or None: a table's cells are texts, and such facts may be missing."""
    return value if isinstance(value, kind) else None


def _box(where: str, record: Any) -> Box:
    try:
        x1, y1, x2, y2 = map(float, record["xyxy"])
        return Box(int(record.get("image", 0)), str(record.get("label", "")), (x1, y1, x2, y2))
    except (KeyError, TypeError, ValueError) as error:
        raise _bad(where, f"the box {record!r}") from error


def _bad(where: str, found: str) -> DataError:
    return DataError(
        "bad_prediction",
        f"{where}: found {found}; expected an object with the texts id and prediction (and boxes, "
        "if any, as label and xyxy)",
    )
