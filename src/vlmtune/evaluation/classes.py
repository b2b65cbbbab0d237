"""Classification: macro-F1, and which class was taken for which.

A class is the normalised first reference of a row; the row's other references are other spellings
of it. The classes are those of the references: an answer that names none of them is of no class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmtune.evaluation.metric import Array, Details, Metric, RowStatistics
from vlmtune.evaluation.text_metrics import normalise

NONE = -1  # the class of an answer that names none


def classes_of(references: Sequence[Sequence[str]]) -> list[str]:
    """The classes of a set, in alphabetical order."""
    return sorted({normalise(row[0]) for row in references})


def class_reader(references: Sequence[Sequence[str]]) -> RowStatistics:
    """Of a row: the number of its true class, and that of the class that was named, or -1."""
    numbers = {name: number for number, name in enumerate(classes_of(references))}

    def read(prediction: str, accepted: Sequence[str]) -> tuple[float, float]:
        true = numbers[normalise(accepted[0])]
        said = normalise(prediction)
        right = said in map(normalise, accepted)
        return float(true), float(true if right else numbers.get(said, NONE))

    return read


def macro_f1(counts: Array, stats: Array) -> Array:
    """Mean F1 of the classes that occur among the references of the drawn rows.

    Args:
        counts: How often each row counts, shape ``(..., rows)``.
        stats: True and named class of each row, shape ``(rows, 2)``.
    """
    true, named = stats.astype(np.int64).T
    size = int(max(true.max(), named.max())) + 1
    answered = named >= 0
    values = [
        _mean_f1(
            np.bincount(true[true == named], each[true == named], size),
            np.bincount(true, each, size),
            np.bincount(named[answered], each[answered], size),
        )
        for each in counts.reshape(-1, len(stats))
    ]
    return np.array(values).reshape(counts.shape[:-1])


def _mean_f1(right: NDArray[Any], true: NDArray[Any], named: NDArray[Any]) -> float:
    occurs = true > 0
    return float(np.mean(2 * right[occurs] / (true + named)[occurs]))


def confusion(
    predictions: Sequence[str], references: Sequence[Sequence[str]], stats: Array
) -> dict[str, Any]:
    """Classes, precision, recall and F1 of each, and which was taken for which.

    Returns:
        ``classes`` (names), ``per_class`` (in their order) and ``cells``: true class, named class
        (the number of classes: none of them), rows; only where there are rows, most rows first.
    """
    del predictions
    names = classes_of(references)
    pairs = Counter((int(true), int(named) % (len(names) + 1)) for true, named in stats)
    per_class = []
    for number in range(len(names)):
        right = pairs[number, number]
        support = sum(rows for (true, _), rows in pairs.items() if true == number)
        named = sum(rows for (_, said), rows in pairs.items() if said == number)
        per_class.append(
            {
                "precision": right / named if named else 0.0,
                "recall": right / support,
                "f1": 2 * right / (named + support),
                "rows": support,
            }
        )
    cells = [[true, named, rows] for (true, named), rows in sorted(pairs.items())]
    return {
        "classes": names,
        "per_class": per_class,
        "cells": sorted(cells, key=lambda cell: -cell[2]),
    }


def matrix(details: Mapping[str, Any]) -> Array:
    """The cells as a table: true class by named class, shape ``(classes, classes + 1)``.

    The last column is of answers that name no class.
    """
    size = len(details["classes"])
    table = np.zeros((size, size + 1))
    for true, named, rows in details["cells"]:
        table[true, named] = rows
    return table


def _words(details: Mapping[str, Any]) -> str:
    names = details["classes"]
    none = sum(rows for _, named, rows in details["cells"] if named == len(names))
    wrong = [cell for cell in details["cells"] if cell[0] != cell[1] and cell[1] < len(names)]
    said = f"{len(names)} classes; {none} answers name none of them"
    if wrong:
        true, named, rows = wrong[0]
        said += f"; most often {names[true]!r} was taken for {names[named]!r}, {rows} times"
    return said


def _alone(stats: Array) -> Array:
    """A row by itself is one class, which was found or not."""
    return (stats[:, 0] == stats[:, 1]).astype(np.float64)


MACRO_F1 = Metric(
    name="macro_f1",
    range=(0.0, 1.0),
    higher_is_better=True,
    meaning="F1 of each class, averaged over the classes among the references",
    source="Sokolova and Lapalme (2009); scikit-learn's f1_score(average='macro')",
    of_set=class_reader,
    value=macro_f1,
    alone=_alone,
    details=Details(confusion, _words),
)
