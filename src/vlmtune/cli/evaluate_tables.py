"""What ``vlmtune eval`` shows on a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmtune.evaluation.markup import visible
from vlmtune.evaluation.metrics import find

WIDEST = 1000  # cells are not wrapped: a narrow terminal does that better than a cut figure
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The result of one model, or several side by side."""
    models = result.get("models")
    if models is None:
        for name, value in result["metrics"].items():
            yield f"{name}: {_interval(value)}"
        yield f"{result['samples']:,} rows"
        yield from result["remarks"]
        yield f"report: {result['report']}"
        return
    names = [LETTERS[place] if place < 26 else str(place + 1) for place in range(len(models))]
    for letter, each in zip(names, models, strict=True):
        yield f"{letter}: {visible(each['model'])}"
    yield from _table(names, models)
    yield f"{result['samples']:,} rows; brackets are 95 % intervals; differences are paired"
    for letter, each in zip(names, models, strict=True):
        yield from (f"{letter}: {remark}" for remark in each["remarks"])
        yield f"{letter}: report: {each['report']}"


def _table(names: Sequence[str], models: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row a metric: the first model, and each further one with what it differs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, leading=1)
    for heading in ("metric", names[0]):
        table.add_column(heading)
    for letter in names[1:]:
        table.add_column(letter)
        table.add_column(f"{letter} - {names[0]}")
    for metric, value in models[0]["metrics"].items():
        cells = [_value(value)]
        for each in models[1:]:
            cells += [_value(each["metrics"][metric]), _change(each["differences"][metric])]
        table.add_row(metric if find(metric).higher_is_better else f"{metric}\n(lower)", *cells)
    page = io.StringIO()
    Console(file=page, width=WIDEST).print(table)
    return [line.rstrip() for line in page.getvalue().splitlines()]


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _value(value: Mapping[str, float]) -> Text:
    return Text(_interval(value).replace(" ", "\n", 1))


def _change(value: Mapping[str, Any]) -> Text:
    """A difference, what may be claimed, and how probable it is that the model is the better."""
    said = "no claim" if value["verdict"] == "none" else value["verdict"]
    return Text(
        f"{value['value']:+.3f} {said}\n[{value['low']:+.3f}, {value['high']:+.3f}]\n"
        f"p better {value['probability']:.2f}"
    )
