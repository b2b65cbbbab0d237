"""The rows of a report: picture, truth, answers side by side, and what is wrong in each answer."""

from __future__ import annotations

from collections.abc import Sequence

from vlmtune.evaluation.markup import Html, group, tag
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.report_content import (
    MOST_PICTURES,
    ReportContent,
    ReportRow,
    chosen,
    moved_words,
)
from vlmtune.evaluation.report_pictures import ALBUM, THUMBNAIL, Album
from vlmtune.evaluation.report_texts import LONGEST, cut, faults, shown
from vlmtune.evaluation.report_words import figure, metric_words, signed

TITLES = {
    "worst": ("The worst row", "The {} worst rows"),
    "fallen": ("The row that lost most in training", "The {} further rows that lost most"),
    "best": ("The best row", "The {} best rows"),
}


def rows_section(content: ReportContent) -> Html:
    """Worst rows, those that lost most, and best rows."""
    groups = {why: rows for why, rows in chosen(content).items() if rows}
    if not groups:
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
    parts = [tag("p", _lead(content, groups), class_="lead"), legend]
    album = Album(content)
    for why, rows in groups.items():
        one, many = TITLES[why]
        parts += [
            tag("h3", one if len(rows) == 1 else many.format(len(rows))),
            group(group(["\n", card(row, content, album)]) for row in rows),
        ]
    return group(parts)


def _lead(content: ReportContent, groups: dict[str, list[ReportRow]]) -> str:
    scored = sum(row.score is not None for row in content.rows)
    words = f"Rows with a score: {scored:,} of {len(content.rows):,}"
    if content.metrics:
        words += f", in {metric_words(content.metrics[0])}"
    showing = sum(map(len, groups.values()))
    bounds = (
        f"Shown: {showing:,}, with at most {MOST_PICTURES} pictures each, reduced to "
        f"{THUMBNAIL[0]} × {THUMBNAIL[1]} pixels and {ALBUM // 2**20} MB in all, and the first "
        f"{LONGEST:,} characters of a text; all answers are in predictions.jsonl."
    )
    return " ".join(part for part in (f"{words}.", moved_words(content), bounds) if part)


def card(row: ReportRow, content: ReportContent, album: Album) -> Html:
    """A row: its picture, the truth, and each answer with its faults marked."""
    truth = row.truth[0] if row.truth else ""
    columns = [
        _column(
            "Truth",
            [album.formula(truth, "the truth, as a formula"), _text(shown(truth))],
            kind="truth",
        )
    ]
    for when, answer, score, ended in (
        ("before", row.before, row.score_before, row.cut_before),
        ("after", row.after, row.score_after, row.cut_after),
    ):
        if answer is not None:
            label = "Answer" if content.alone else when.capitalize()
            drawn = album.formula(answer, f"the answer {when} training, as a formula")
            text = _text(faults(answer, row.truth))
            columns.append(_column(label, [drawn, text], score, kind=when, cut_short=ended))
    others = [tag("span", cut(text), dir="auto") for text in row.truth[1:]]
    also = tag("p", tag("b", "Also accepted: "), group(_joined(others)), class_="also")
    return tag(
        "article",
        tag("header", tag("h4", row.id, dir="auto"), _change(row, content)),
        album.pictures(row),
        tag("p", cut(row.question), class_="question", dir="auto") if row.question else "",
        tag("div", *columns, class_="columns"),
        also if others else "",
        class_="row",
    )


def _joined(parts: Sequence[Html]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        joined += [" · ", part] if joined else [part]
    return joined


def _text(text: Html) -> Html:
    return tag("div", text, class_="text", dir="auto")


def _column(
    label: str,
    parts: Sequence[Html],
    score: float | None = None,
    *,
    kind: str,
    cut_short: bool = False,
) -> Html:
    title = tag(
        "h5",
        label,
        tag("span", "cut at the limit", class_="badge none") if cut_short else "",
        tag("span", figure(score), class_="score") if score is not None else "",
    )
    return tag("div", title, *parts, class_=f"column {kind}")


def _change(row: ReportRow, content: ReportContent) -> Html:
    """The row's change in words, coloured by whether it is an improvement."""
    if row.score_before is None or row.score_after is None or not content.metrics:
        return Html("")
    gain = row.score_after - row.score_before
    if figure(gain) == "0.000":
        return tag("span", "unchanged", class_="badge none")
    improved = (gain > 0) == find(content.metrics[0]).higher_is_better
    return tag("span", signed(gain), class_=f"badge {'better' if improved else 'worse'}")
