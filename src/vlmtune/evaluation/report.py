"""The report of a run: one HTML file that needs nothing else and runs nothing.

What it says is in ``report_content``, the rows are in ``report_rows``, the curves in ``plots``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtune.evaluation.intervals import Estimate
from vlmtune.evaluation.markup import Html, group, tag
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.model_card import write_model_card
from vlmtune.evaluation.page import document
from vlmtune.evaluation.plots import curve, points_of, whiskers
from vlmtune.evaluation.report_content import (
    VERDICTS,
    ReportContent,
    ReportRow,
    difference_words,
    estimate_words,
    facts,
    figure,
    headline,
    ledger_lines,
    ledger_words,
    metric_words,
    moved,
    ranked,
    total_words,
)
from vlmtune.evaluation.report_rows import cards
from vlmtune.evaluation.report_style import STYLE
from vlmtune.files import write_text

__all__ = ["ReportContent", "ReportRow", "report_html", "write_model_card", "write_report"]

MOST_ROWS = 20  # worst, and as many best


def write_report(path: Path, content: ReportContent) -> None:
    """Write the report as one HTML file."""
    write_text(path, report_html(content))


def report_html(content: ReportContent) -> str:
    """The report; the same content gives the same bytes."""
    sections = [
        ("results", "Results", _results(content)),
        ("training", "Training", _training(content)),
        ("rows", "Rows", _rows(content)),
        ("data", "Data", _data(content)),
        ("recipe", "Recipe and versions", _recipe(content)),
        ("reproduce", "Reproduce", _reproduce(content)),
    ]
    return document(
        kind="vlmtune report",
        title=content.title,
        heading=tag("h1", content.title, dir="auto"),
        top=[_verdict(content), _tiles(content.totals)],
        sections=sections,
        style=STYLE,
    )


def _verdict(content: ReportContent) -> Html:
    parts = [tag("span", VERDICTS[content.verdict], class_=f"word {content.verdict}")]
    if content.metrics:
        name = content.metrics[0]
        before, after = content.estimates(name)
        numbers = [tag("span", metric_words(name), class_="name")]
        if before is not None:
            numbers.append(tag("span", figure(before.value), class_="big from"))
        if before is not None and after is not None:
            numbers.append(tag("span", "→", class_="big from"))
        if after is not None:
            numbers.append(tag("span", figure(after.value), class_="big"))
        parts.append(tag("div", *numbers, class_="numbers"))
    parts.append(tag("p", headline(content), class_="sentence"))
    return tag("div", *parts, class_=f"verdict {content.verdict}")


def _tiles(totals: Mapping[str, float]) -> Html:
    if not totals:
        return Html("")
    return tag(
        "dl",
        *(
            tag("div", tag("dt", _total_title(name)), tag("dd", total_words(name, value)))
            for name, value in totals.items()
        ),
        class_="tiles",
    )


def _total_title(name: str) -> str:
    words = {
        "seconds": "training time",
        "label_tokens": "tokens trained on",
        "samples_per_second": "throughput",
    }.get(name, name)
    return words.removesuffix("_bytes").replace("_", " ").capitalize()


def _results(content: ReportContent) -> Html:
    if not content.metrics:
        return Html("")
    keys = [
        tag("span", label.capitalize(), class_=f"key {label}")
        for label, found in (("before", content.before), ("after", content.after))
        if found
    ]
    titles = ["Metric", "Before", "After", "Difference", "", group([*keys[:1], "  ", *keys[1:]])]
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", title, scope="col") for title in titles))),
        tag("tbody", *(_metric(name, content) for name in content.metrics)),
        class_="metrics",
    )
    lead = (
        "Brackets are 95 % intervals: Wilson's for shares of rows, bootstrap over rows otherwise. "
        "Differences are paired: both models are judged on the same drawn rows."
    )
    return group([tag("p", lead, class_="lead"), tag("div", table, class_="card")])


def _metric(name: str, content: ReportContent) -> Html:
    metric = find(name)
    before, after = content.estimates(name)
    difference = content.difference(name)
    verdict = difference.verdict if difference else "untested"
    top = max([1.0, *(e.high for e in (before, after) if e is not None)])
    direction = "higher is better" if metric.higher_is_better else "lower is better"
    return tag(
        "tr",
        tag("th", metric_words(name), tag("small", f"{metric.meaning}; {direction}"), scope="row"),
        tag("td", _value(before), data_label="Before"),
        tag("td", _value(after), data_label="After"),
        tag("td", _bracketed(difference_words(difference)), data_label="Difference"),
        tag("td", tag("span", _short(verdict), class_=f"badge {verdict}") if difference else ""),
        tag("td", whiskers(before, after, top)),
    )


def _short(verdict: str) -> str:
    return {"none": "no claim"}.get(verdict, verdict)


def _value(estimate: Estimate | None) -> Html:
    return _bracketed(estimate_words(estimate))


def _bracketed(words: str) -> Html:
    """``0.721 [0.660, 0.770]`` with the interval set apart."""
    value, _, interval = words.partition(" ")
    return tag(
        "span", tag("span", value, class_="value"), " ", tag("span", interval, class_="range")
    )


def _training(content: ReportContent) -> Html:
    steps = content.steps
    probe = points_of(steps, "probe_loss")
    figures = [
        curve(
            "Loss",
            "per trained token",
            {"loss": points_of(steps, "loss"), "probe rows": probe},
        ),
        curve("Learning rate", "", {"": points_of(steps, "learning_rate")}, smoothed=False),
        curve("Gradient norm", "before clipping", {"": points_of(steps, "gradient_norm")}),
        curve("Throughput", "samples a second", {"": points_of(steps, "samples_per_second")}),
    ]
    drawn = [drawing for drawing in figures if drawing]
    if not drawn:
        return Html("")
    bad = [row for row in steps if _is_not_finite(row)]
    warning = (
        f"Loss or gradients were not finite in {len(bad):,} of {len(steps):,} steps, which the "
        "curves leave out."
    )
    return group(
        [
            tag("p", warning, class_="fails") if bad else "",
            tag("div", *drawn, class_="curves"),
        ]
    )


def _is_not_finite(step: Mapping[str, Any]) -> bool:
    """Whether a step was not applied; a run logs no value then, as JSON has no NaN."""
    logged = step.get("loss") is not None
    return step.get("applied") is False or (logged and not points_of([step], "loss"))


def _rows(content: ReportContent) -> Html:
    worst, best = ranked(content, MOST_ROWS)
    if not worst:
        return Html("")
    legend = tag(
        "p",
        "In an answer, ",
        tag("ins", "marked and underlined"),
        " is not in the closest accepted answer, and ",
        tag("del", "struck out"),
        " is missing from the model's.",
        class_="legend",
    )
    parts = [tag("p", _rows_lead(content), class_="lead"), legend]
    for title, rows in (("worst", worst), ("best", best)):
        if rows:
            count = f"The {len(rows)} {title} rows" if len(rows) > 1 else f"The {title} row"
            parts += [tag("h3", count), cards(rows, content)]
    return group(parts)


def _rows_lead(content: ReportContent) -> str:
    scored = sum(row.score is not None for row in content.rows)
    words = [f"{scored:,} of {len(content.rows):,} rows have a score"]
    if content.metrics:
        words.append(f", in {metric_words(content.metrics[0])}")
    change = moved(content)
    if change:
        better, same, worse = change
        words.append(
            f": after training {better:,} scored better, {same:,} the same, {worse:,} worse"
        )
    return "".join([*words, "."])


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


def _data(content: ReportContent) -> Html:
    blocks = [
        block for block in (_ledger(content.ledger), _facts("Data set", content.data)) if block
    ]
    return tag("div", *blocks, class_="two") if blocks else Html("")


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


def _recipe(content: ReportContent) -> Html:
    left = [
        tag("div", tag("h3", "Recipe"), tag("div", tag("pre", content.recipe_yaml), class_="card"))
        if content.recipe_yaml
        else Html("")
    ]
    right = [_facts("Versions and hardware", content.environment)]
    right.append(_facts("Preprocessing contract", content.contract))
    columns = [tag("div", *(part for part in side if part)) for side in (left, right) if any(side)]
    return tag("div", *columns, class_="two") if columns else Html("")


def _reproduce(content: ReportContent) -> Html:
    if not content.reproduce:
        return Html("")
    return tag("div", tag("pre", content.reproduce), class_="card")
