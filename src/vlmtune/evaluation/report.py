"""The report of a run: one HTML file that needs nothing else and runs nothing.

What it says is in ``report_content`` and ``report_words``; each section has a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlmtune.evaluation.markup import Html, tag
from vlmtune.evaluation.model_card import write_model_card
from vlmtune.evaluation.page import document
from vlmtune.evaluation.report_content import ReportContent, ReportRow, headline, moved_words
from vlmtune.evaluation.report_facts import data_section, recipe_section, reproduce_section
from vlmtune.evaluation.report_results import (
    bracketed,
    classes_section,
    results_section,
    slices_section,
)
from vlmtune.evaluation.report_rows import rows_section
from vlmtune.evaluation.report_style import STYLE
from vlmtune.evaluation.report_training import training_section
from vlmtune.evaluation.report_words import (
    VERDICTS,
    difference_words,
    figure,
    metric_words,
    total_words,
)
from vlmtune.files import write_text

__all__ = ["ReportContent", "ReportRow", "report_html", "write_model_card", "write_report"]


def write_report(path: Path, content: ReportContent) -> None:
    """Write the report as one HTML file."""
    write_text(path, report_html(content))


def report_html(content: ReportContent) -> str:
    """The report; the same content gives the same bytes."""
    sections = [
        ("results", "Results", results_section(content)),
        ("slices", "Slices", slices_section(content)),
        ("classes", "Classes", classes_section(content)),
        ("training", "Training", training_section(content)),
        ("rows", "Rows", rows_section(content)),
        ("data", "Data", data_section(content)),
        ("recipe", "Recipe and versions", recipe_section(content)),
        ("reproduce", "Reproduce", reproduce_section(content)),
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
        difference = content.difference(name)
        if difference is not None:
            numbers.append(tag("span", bracketed(difference_words(difference)), class_="change"))
        parts.append(tag("div", *numbers, class_="numbers"))
    parts.append(tag("p", headline(content), class_="sentence"))
    rows = moved_words(content)
    parts.append(tag("p", rows, class_="sentence") if rows else Html(""))
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
        class_="tiles four",
    )


def _total_title(name: str) -> str:
    words = {
        "seconds": "training time",
        "label_tokens": "tokens trained on",
        "samples_per_second": "throughput",
        "tokens_per_second": "tokens a second",
        "peak_memory_bytes": "peak memory",
    }.get(name, name)
    return words.removesuffix("_bytes").replace("_", " ").capitalize()
