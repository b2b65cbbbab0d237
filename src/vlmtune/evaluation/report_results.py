"""What was measured: the metrics, the answers that were cut, the slices, the confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmtune.evaluation.classes import matrix
from vlmtune.evaluation.intervals import FEWEST_CHANGED, Difference, Estimate
from vlmtune.evaluation.markup import Html, group, tag
from vlmtune.evaluation.metric import Array
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.plots import whiskers
from vlmtune.evaluation.report_content import ReportContent, Slicing, cut_words
from vlmtune.evaluation.report_words import (
    counted,
    difference_words,
    estimate_words,
    figure,
    metric_words,
    probability_words,
)

MOST_CLASSES = 12  # of a matrix; the others are one row and one column
MOST_CONFUSIONS = 10
LONGEST_CLASS = 80  # characters
OTHERS = "others"


def results_section(content: ReportContent) -> Html:
    """Every metric before and after, and what there is to say beside them."""
    if not content.metrics:
        return Html("")
    lead = (
        "Brackets are 95 % intervals: Wilson's for shares of rows, bootstrap over rows otherwise."
    )
    if content.differences:
        lead += (
            " Differences are paired: both models are judged on the same drawn rows, and the "
            "probability is the share of draws in which the later one is better."
        )
    return group(
        [
            tag("p", lead, class_="lead"),
            tag("div", _metrics(content), class_="card"),
            *_answers(content),
        ]
    )


def _metrics(content: ReportContent) -> Html:
    lines = []
    for name in content.metrics:
        metric = find(name)
        direction = "higher is better" if metric.higher_is_better else "lower is better"
        what = group([metric_words(name), tag("small", f"{metric.meaning}; {direction}")])
        lines.append(Line(what, *content.estimates(name), content.difference(name)))
    return estimates_table("Metric", lines, content)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a table of estimates."""

    what: str
    before: Estimate | None
    after: Estimate | None
    difference: Difference | None
    rows: int | None = None


def estimates_table(
    title: str, lines: Sequence[Line], content: ReportContent, *, one_scale: bool = False
) -> Html:
    """Values with their intervals and differences; on a phone each line is a block.

    Args:
        title: Of the first column.
        lines: The lines.
        content: Says which columns there are.
        one_scale: Whether all lines share a scale.
    """
    labels = content.labels
    keys = [
        part
        for when, label in labels.items()
        for part in (tag("span", label, class_=f"key {when}"), "  ")
    ]
    counts = any(line.rows is not None for line in lines)
    titles = [title, *(["Rows"] if counts else []), *labels.values()]
    if content.differences is not None:
        titles += ["Difference", ""]
    heads = [*titles, group(keys) if len(labels) > 1 else ""]
    tops = [scale_end([line.before, line.after]) for line in lines]
    if one_scale:
        tops = [max(tops)] * len(tops)
    return tag(
        "table",
        tag("thead", tag("tr", *(tag("th", head, scope="col") for head in heads))),
        tag("tbody", *(_line(line, content, top) for line, top in zip(lines, tops, strict=True))),
        class_="metrics stacked",
    )


def scale_end(estimates: Iterable[Estimate | None]) -> float:
    """End of a scale from 0 on which they all lie: 1, or as many halves as it takes."""
    return max(1.0, *(math.ceil(2 * each.high) / 2 for each in estimates if each is not None))


def _line(line: Line, content: ReportContent, top: float) -> Html:
    values = {"before": line.before, "after": line.after}
    cells = [tag("th", line.what, scope="row", dir="auto")]
    if line.rows is not None:
        cells.append(tag("td", f"{line.rows:,}", data_label="Rows"))
    cells += [
        tag("td", bracketed(estimate_words(values[when])), class_=when, data_label=label)
        for when, label in content.labels.items()
    ]
    if content.differences is not None:
        words = bracketed(difference_words(line.difference))
        cells += [tag("td", words, data_label="Difference"), tag("td", claim(line.difference))]
    drawn = whiskers([(when, values[when]) for when in content.labels], top)
    return tag("tr", *cells, tag("td", drawn))


def claim(difference: Difference | None) -> Html:
    """What may be claimed of a difference, and how probable it is."""
    if difference is None:
        return Html("")
    word = {"none": "no claim"}.get(difference.verdict, difference.verdict)
    chance = f"likely better: {probability_words(difference.probability)}"
    if difference.changed < FEWEST_CHANGED:
        chance = f"{counted(difference.changed, 'row')} changed"
    return group([tag("span", word, class_=f"badge {difference.verdict}"), tag("small", chance)])


def bracketed(words: str) -> Html:
    """``0.721 [0.660, 0.770]`` with the interval set apart."""
    value, _, interval = words.partition(" ")
    return tag(
        "span", tag("span", value, class_="value"), " ", tag("span", interval, class_="range")
    )


def _answers(content: ReportContent) -> Iterator[Html]:
    """What is to be said of the answers themselves."""
    lines = [
        tag("li", tag("b", f"{label}: ") if len(content.labels) > 1 else "", words)
        for when, label in content.labels.items()
        if when in content.answers
        for words in (cut_words(content.answers[when]), *content.answers[when].remarks)
        if words
    ]
    if lines:
        yield tag("h3", "Beside the metrics")
        yield tag("ul", *lines, class_="remarks")


# Slices


def slices_section(content: ReportContent) -> Html:
    """The primary metric on parts of the rows."""
    if not content.slicings:
        return Html("")
    lead = (
        f"{metric_words(content.metrics[0])} on parts of the rows, each with its own interval. Of "
        "many slices some look better or worse by chance alone: one interval in twenty misses."
    )
    parts = [_slicing(slicing, content) for slicing in content.slicings]
    return group([tag("p", lead, class_="lead"), *parts])


def _slicing(slicing: Slicing, content: ReportContent) -> Html:
    lines = [
        Line(each.name, each.before, each.after, each.difference, each.rows)
        for each in slicing.slices
    ]
    table = estimates_table("Slice", lines, content, one_scale=True)
    left = f"{counted(slicing.left_out, 'row')} without it left out."
    return group(
        [
            tag("h3", slicing.by),
            tag("div", table, class_="card"),
            tag("p", left, class_="muted") if slicing.left_out else "",
        ]
    )


# Classes


def classes_section(content: ReportContent) -> Html:
    """Which class was taken for which, after training, or before where there is no after."""
    for when in reversed(content.labels):
        answers = content.answers.get(when)
        if answers is not None and answers.confusion:
            of = f"Answers {when} training: " if len(content.labels) > 1 else ""
            return _confusion(answers.confusion, of)
    return Html("")


def _confusion(details: Mapping[str, Any], of: str) -> Html:
    names, table = _folded(details)
    titles = [*names, "none of them"]
    lead = (
        f"{of}a line is a true class, a column what was answered; numbers are rows. The stronger "
        "the colour, the larger the share of the line."
    )
    head = tag(
        "tr",
        tag("th", "true \\ answered", scope="col"),
        *(tag("th", _class_name(title), scope="col", dir="auto") for title in titles),
        tag("th", "recall", scope="col"),
    )
    lines = [_class(name, number, table[number]) for number, name in enumerate(names)]
    matrix_table = tag("table", tag("thead", head), tag("tbody", *lines), class_="matrix")
    return group(
        [
            tag("p", lead, class_="lead"),
            tag("div", matrix_table, class_="card wide"),
            *_most_confused(details),
        ]
    )


def _folded(details: Mapping[str, Any]) -> tuple[list[str], Array]:
    """Classes and cells with the rarest classes made one, shape ``(classes, classes + 1)``."""
    names, table = list(details["classes"]), matrix(details)
    if len(names) <= MOST_CLASSES:
        return names, table
    order = np.argsort(-table.sum(axis=1), kind="stable")
    kept, rest = np.sort(order[: MOST_CLASSES - 1]), np.sort(order[MOST_CLASSES - 1 :])
    rows = np.vstack([table[kept], table[rest].sum(axis=0)])
    columns = [rows[:, kept], rows[:, rest].sum(axis=1, keepdims=True), rows[:, -1:]]
    return [*(names[number] for number in kept), f"{len(rest):,} {OTHERS}"], np.hstack(columns)


def _class(name: str, number: int, cells: Array) -> Html:
    total = cells.sum()
    shown = [
        tag(
            "td",
            f"{int(value):,}" if value else "·",
            class_="right" if place == number else "wrong" if value else "none",
            style=f"--share: {100 * value / total:.0f}%" if value else None,
        )
        for place, value in enumerate(cells)
    ]
    recall = figure(float(cells[number] / total)) if total and OTHERS not in name else ""
    return tag(
        "tr", tag("th", _class_name(name), scope="row", dir="auto"), *shown, tag("td", recall)
    )


def _class_name(name: str) -> str:
    return name if len(name) <= LONGEST_CLASS else f"{name[: LONGEST_CLASS - 1]}…"


def _most_confused(details: Mapping[str, Any]) -> Iterator[Html]:
    names = [*map(_class_name, details["classes"]), "none of the classes"]
    wrong = [cell for cell in details["cells"] if cell[0] != cell[1]][:MOST_CONFUSIONS]
    if wrong:
        yield tag("h3", "Most often confused")
        yield tag(
            "ul",
            *(
                tag(
                    "li",
                    tag("b", names[true], dir="auto"),
                    " taken for ",
                    tag("b", names[said], dir="auto"),
                    f": {counted(rows, 'row')}",
                )
                for true, said, rows in wrong
            ),
            class_="remarks",
        )
