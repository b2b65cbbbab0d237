"""What a run was made of: where every row went, data, recipe, versions, how to run it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmtune.evaluation.markup import Html, tag
from vlmtune.evaluation.report_content import ReportContent, ledger_lines, ledger_words
from vlmtune.evaluation.report_words import facts


def data_section(content: ReportContent) -> Html:
    """The account of rows, and the data set."""
    blocks = [
        block for block in (_ledger(content.ledger), _facts("Data set", content.data)) if block
    ]
    return tag("div", *blocks, class_="two") if blocks else Html("")


def recipe_section(content: ReportContent) -> Html:
    """Recipe, versions, contract."""
    left = [
        tag("div", tag("h3", "Recipe"), tag("div", tag("pre", content.recipe_yaml), class_="card"))
        if content.recipe_yaml
        else Html("")
    ]
    right = [_facts("Versions and hardware", content.environment)]
    right.append(_facts("Preprocessing contract", content.contract))
    columns = [tag("div", *(part for part in side if part)) for side in (left, right) if any(side)]
    return tag("div", *columns, class_="two") if columns else Html("")


def reproduce_section(content: ReportContent) -> Html:
    """The commands that run it again."""
    if not content.reproduce:
        return Html("")
    return tag("div", tag("pre", content.reproduce), class_="card")


def _facts(title: str, mapping: Mapping[str, Any]) -> Html:
    if not mapping:
        return Html("")
    lines = [
        tag("tr", tag("th", key, scope="row"), tag("td", value, dir="auto"))
        for key, value in facts(mapping)
    ]
    return tag(
        "div",
        tag("h3", title),
        tag("div", tag("table", tag("tbody", *lines), class_="facts"), class_="card"),
    )


def _ledger(ledger: Mapping[str, Any]) -> Html:
    if not ledger:
        return Html("")
    holds, words = ledger_words(ledger)
    lines = [
        tag("tr", tag("td", f"{kind}: {code}" if code else kind), tag("td", f"{count:,}"))
        for kind, code, count in ledger_lines(ledger)
    ]
    came = tag("tr", tag("td", "rows in"), tag("td", f"{int(ledger.get('in', 0)):,}"), class_="sum")
    table = tag("table", tag("tbody", *lines, came), class_="facts sums")
    return tag(
        "div",
        tag("h3", "Where every row went"),
        tag("div", table, class_="card"),
        tag("p", words, class_="holds" if holds else "fails"),
    )
