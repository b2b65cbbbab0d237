"""The primary metric on parts of the rows: short and long answers, small and large pictures.

A slice's rows keep the statistics that they have in the whole set, so that a metric which knows all
references (CIDEr, macro-F1) means the same in each.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlmtune.data.conversation import Conversation
from vlmtune.data.media import ImagePolicy, read_header
from vlmtune.errors import ImageError, UsageError
from vlmtune.evaluation.intervals import compare, estimate
from vlmtune.evaluation.metric import Array, Metric
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.report_content import Slice, Slicing
from vlmtune.evaluation.run import Evaluation, Prediction, statistics_of

META = "meta."
MOST_BINS = 4  # of a number
FEWEST_IN_BIN = 5  # rows; a number is cut into fewer parts where there would be less
MOST_VALUES = 12  # of a column that are a slice each
MOST_COLUMNS = 3  # of meta that are sliced by without being asked for
FEW_VALUES = 0.5  # of the rows at most, in a column that looks like classes
LONGEST_NAME = 60  # characters

Groups = dict[str, list[int]]  # rows of each slice, by its name


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What rows are told apart by.

    Attributes:
        answer: The answer trained on.
        pixels: Of all its pictures as they came; None if it has none that can be opened.
        meta: The row's own, nested columns by dotted name.
    """

    answer: str
    pixels: int | None
    meta: Mapping[str, Any]


def row_facts(row: Conversation, references: Sequence[str]) -> RowFacts:
    """The facts of a row; its pictures are not decoded."""
    try:
        sizes = [read_header(image.data, ImagePolicy()).size for image in row.images]
    except ImageError:
        sizes = []
    pixels = sum(size.width * size.height for size in sizes) if sizes else None
    return RowFacts(references[0] if references else "", pixels, dict(_flat(row.meta)))


def slicings(
    name: str,
    before: Evaluation | None,
    after: Evaluation | None,
    facts: Mapping[str, RowFacts],
    asked: Sequence[str] = (),
) -> list[Slicing]:
    """A metric by true answer or its length, size of the pictures and columns of ``meta``.

    Args:
        name: The metric's.
        before: The answers before training.
        after: The answers after; where there are both, only rows that both answered count.
        facts: By id; rows without are left out.
        asked: Columns of meta, as ``meta.KEY``; if none, those that look like classes.

    Raises:
        UsageError: If no row has a column that was asked for.
    """
    known = [each for each in (before, after) if each is not None]
    said = [{row.id: row for row in each.predictions} for each in known]
    ids = [id for id in (said[-1] if said else {}) if id in facts and all(id in s for s in said)]
    rows = [facts[id] for id in ids]
    groups = {
        **_by_answer([row.answer for row in rows]),
        "Size of the pictures": binned([row.pixels for row in rows], "pixel"),
        **{META + key: valued([row.meta.get(key) for row in rows]) for key in _keys(rows, asked)},
    }
    wanted = {by: each for by, each in groups.items() if len(each) > 1 or by in asked}
    if not wanted:
        return []
    metric = find(name)
    last = [said[-1][id] for id in ids]
    numbers = [
        statistics_of(metric, _judged(each, last), evaluation.normalise)
        for each, evaluation in zip(said, known, strict=True)
    ]
    first = numbers[0] if before is not None else None
    second = numbers[-1] if after is not None else None
    return [_slicing(by, each, metric, first, second, len(ids)) for by, each in wanted.items()]


def _judged(said: Mapping[str, Prediction], last: Sequence[Prediction]) -> list[Prediction]:
    """Predictions for the rows of the later ones; theirs is the truth, should it have changed."""
    return [replace(said[row.id], references=row.references, truth=row.truth) for row in last]


def _by_answer(answers: Sequence[str]) -> dict[str, Groups]:
    """By the answer itself where there are few of them, as in classification, else by length."""
    if _looks_like_classes(answers):
        return {"True answer": valued(answers)}
    return {"Length of the true answer": binned([len(text) for text in answers], "character")}


def _slicing(
    by: str, groups: Groups, metric: Metric, first: Array | None, second: Array | None, rows: int
) -> Slicing:
    slices = []
    for name, places in groups.items():
        before = _part(metric, first, places)
        after = _part(metric, second, places)
        difference = None
        if before is not None and after is not None:
            difference = compare(metric, before, after, seed=0)
        slices.append(
            Slice(
                name=name,
                rows=len(places),
                before=None if before is None else estimate(metric, before),
                after=None if after is None else estimate(metric, after),
                difference=difference,
            )
        )
    return Slicing(by=by, slices=slices, left_out=rows - sum(map(len, groups.values())))


def _part(metric: Metric, stats: Array | None, places: Sequence[int]) -> Array | None:
    """Statistics of a part of the rows; None if the metric says nothing about any of them."""
    if stats is None:
        return None
    part = stats[np.array(places)]
    return None if np.isnan(metric.alone(part)).all() else part


def binned(values: Sequence[float | None], unit: str = "") -> Groups:
    """Rows by a number, in up to four parts with about equally many; equal values stay together."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return {}
    bins = max(1, min(MOST_BINS, len(known) // FEWEST_IN_BIN))
    cuts = sorted({known[len(known) * number // bins - 1] for number in range(1, bins + 1)})
    groups: Groups = {}
    for low, high in zip([-math.inf, *cuts[:-1]], cuts, strict=True):
        inside = [(row, value) for row, value in enumerate(values) if _lies(value, low, high)]
        numbers = [value for _, value in inside if value is not None]
        groups[_span(min(numbers), max(numbers), unit)] = [row for row, _ in inside]
    return groups


def _lies(value: float | None, low: float, high: float) -> bool:
    return value is not None and low < value <= high


def _span(low: float, high: float, unit: str) -> str:
    words = _number(low) if low == high else f"{_number(low)} to {_number(high)}"
    return f"{words} {unit}{'' if high == 1 else 's'}" if unit else words


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def valued(values: Sequence[Any]) -> Groups:
    """Rows by the value of a column, the commonest first; numbers with many values are binned."""
    numbers = _are_numbers(values)
    if numbers and len(set(values) - {None}) > MOST_VALUES:
        return binned(values)
    names = [None if value is None else _name(value) for value in values]
    counts = Counter(name for name in names if name is not None)
    kept = [name for name, _ in counts.most_common(MOST_VALUES)]
    if numbers:
        kept.sort(key=float)
    groups: Groups = {name: [] for name in kept}
    others = f"{len(counts) - len(kept):,} other values"
    for row, name in enumerate(names):
        if name is not None:
            groups.setdefault(name if name in counts and name in kept else others, []).append(row)
    return groups


def _are_numbers(values: Sequence[Any]) -> bool:
    known = [value for value in values if value is not None]
    plain = all(isinstance(each, int | float) and not isinstance(each, bool) for each in known)
    return plain and all(map(math.isfinite, known))


def _name(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split()) or "(empty)"
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"


def _keys(rows: Sequence[RowFacts], asked: Sequence[str]) -> list[str]:
    """Columns of meta to slice by."""
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for key, value in row.meta.items():
            columns.setdefault(key, []).append(value)
    for column in asked:
        if not column.startswith(META) or column.removeprefix(META) not in columns:
            known = ", ".join(f"{META}{key}" for key in sorted(columns)) or "no such column"
            raise UsageError(
                f"--slices: no evaluated row has the column {column!r}; the rows have {known}"
            )
    if asked:
        return [column.removeprefix(META) for column in asked]
    return [key for key, values in columns.items() if _looks_like_classes(values)][:MOST_COLUMNS]


def _looks_like_classes(values: Sequence[Any]) -> bool:
    """Whether a column has a few values, each of several rows."""
    if not all(isinstance(value, str | bool | int) for value in values):
        return False
    distinct = len(set(map(_name, values)))
    return 2 <= distinct <= min(MOST_VALUES, FEW_VALUES * len(values))


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat.append((f"{prefix}{key}", value))
    return flat
