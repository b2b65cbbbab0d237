"""The page of ``check``: what was found, with the pictures of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from vlmtune.checking.check import AllRows
from vlmtune.checking.codes import code_of
from vlmtune.checking.findings import CheckResult, CodeCount, Finding, Lengths
from vlmtune.checking.page import Tile, page, verdict_box
from vlmtune.data.conversation import Box, Conversation
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.media import ImagePolicy, Size, open_image
from vlmtune.errors import DataError
from vlmtune.evaluation.markup import Html, group, tag
from vlmtune.evaluation.overlay import Mark, data_uri, drawing
from vlmtune.evaluation.page import Section
from vlmtune.evaluation.plots import round_step

SHOWN = 12  # findings of a code that are shown with their pictures
SIDE = 560  # pixels of a picture, at most
LONGEST = 400  # characters of an answer
IMAGES = 4  # of one row
BARS, PLOT = 40, (720.0, 190.0)
CLASSES = 24
MOST_KINDS = 3  # codes that the verdict names

STYLE = """
table.codes td, table.codes th { vertical-align: top; }
table.codes td.count { text-align: right; font-weight: 620; white-space: nowrap; }
table.codes td.count small { display: block; color: var(--muted); font-weight: 400; }
table.codes code { font-weight: 600; }
table.codes .example { color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
table.lengths td { text-align: right; }
table.lengths th, table.lengths td { padding: 6px 14px; font-size: 14px; }
table.lengths thead th:not(:first-child) { text-align: right; }
.histogram .text { fill: var(--text-bar); } .histogram .image { fill: var(--image-bar); }
.histogram .limit { stroke: var(--stop); stroke-dasharray: 4 3; }
.key.text::before { background: var(--text-bar); border-radius: 3px; }
.key.image::before { background: var(--image-bar); border-radius: 3px; }
.classes { display: grid; grid-template-columns: minmax(80px, max-content) 1fr max-content;
  gap: 6px 12px; padding: 14px 16px; font-size: 13.5px; align-items: center; }
.classes .bar { height: 12px; border-radius: 3px; background: var(--text-bar); min-width: 2px; }
.classes .name { overflow-wrap: anywhere; }
.clean { padding: 22px 24px; }
@media (max-width: 720px) {
  table.codes .advice, table.codes .example, table.codes thead th:nth-child(n + 4) {
    display: none; }
}
"""

WORDS = {"stop": "Not ready", "note": "Ready, with notes", "accepted": "Ready"}


def write_check_page(file: Path, data: str | Path, result: CheckResult, model: str = "") -> None:
    """Write the page of a check.

    Args:
        file: Where to.
        data: The dataset that was checked; the pictures are read from it again.
        result: What was found.
        model: What it was checked against, as the user called it.
    """
    rows = AllRows(PreparedDataset.open(data))
    file.write_text(check_html(result, rows, str(data), model), encoding="utf-8", newline="\n")


def check_html(result: CheckResult, rows: AllRows, name: str, model: str = "") -> str:
    """The page; the same content gives the same bytes."""
    counts = result.counts()
    sections: list[Section] = [
        ("findings", "Findings", _table(result, counts)),
        ("tokens", "Tokens a row", _tokens(result.lengths)),
        ("classes", "Classes", _classes(result)),
    ]
    by_code = {
        code: list(each)
        for code, each in groupby(
            sorted(result.findings, key=lambda finding: finding.code), lambda finding: finding.code
        )
    }
    sections += [
        (each.code, each.code, _gallery(each, by_code.get(each.code, []), rows)) for each in counts
    ]
    splits = ", ".join(f"{count:,} {split}" for split, count in rows.splits.items() if count)
    return page(
        kind="vlmtune check",
        title=name,
        subtitle=f"{splits} rows" + (f" · against {model}" if model else ""),
        verdict=_verdict(result, counts),
        tiles=_tiles(result),
        sections=sections,
        style=STYLE,
    )


def _verdict(result: CheckResult, counts: Sequence[CodeCount]) -> Html:
    standing = "note" if result.noted else "accepted"
    standing = standing if result.ok else "stop"
    return verdict_box(
        "better" if standing == "accepted" else standing, WORDS[standing], sentence(result, counts)
    )


def sentence(result: CheckResult, counts: Sequence[CodeCount]) -> str:
    """The verdict in words."""
    if not counts:
        return f"Nothing was found in {result.rows:,} rows."
    stops = [each for each in counts if each.standing == "stop"]
    notes = [each for each in counts if each.standing == "note"]
    accepted = [each for each in counts if each.standing == "accepted"]
    words = []
    if stops:
        words.append(f"{_found(stops)} to mend before training")
    if notes:
        words.append(f"{_found(notes)} worth knowing")
    if accepted:
        words.append(f"{_found(accepted)} accepted beforehand")
    return "; ".join(words) + f". {result.rows:,} rows were looked at."


def _found(counts: Sequence[CodeCount]) -> str:
    """As ``leak`` or ``12 findings (leak, too_long and 3 more kinds)``."""
    number = sum(each.count for each in counts)
    kinds = [each.code for each in counts[:MOST_KINDS]]
    if len(counts) > MOST_KINDS:
        kinds.append(f"and {len(counts) - MOST_KINDS} more kinds")
    return f"{number:,} finding{'' if number == 1 else 's'} ({', '.join(kinds)})"


def _tiles(result: CheckResult) -> list[Tile]:
    tiles = [("Rows", f"{result.rows:,}"), ("Findings", f"{sum(result.found.values()):,}")]
    tokens = result.tokens
    if tokens:
        share = tokens["visual"]["total"] / max(tokens["total"], 1)
        tiles += [
            ("Tokens, median row", f"{tokens['p50']:,}"),
            ("Tokens, longest row", f"{tokens['max']:,}"),
            ("Tokens in all", f"{tokens['total']:,}"),
            ("of images", f"{share:.0%}"),
        ]
    return tiles


def _table(result: CheckResult, counts: Sequence[CodeCount]) -> Html:
    if not counts:
        return tag("div", f"All {result.rows:,} rows are as they should be.", class_="card clean")
    first: dict[str, Finding] = {}
    for finding in result.findings:
        first.setdefault(finding.code, finding)
    titles = ("", "Finding", "Rows", "Example", "What to do")
    lines = []
    for each in counts:
        known, example = code_of(each.code), first[each.code]
        limit = tag("small", f"at most {each.limit:,}") if each.limit else ""
        lines.append(
            tag(
                "tr",
                tag("td", tag("span", each.standing, class_=f"badge {each.standing}")),
                tag(
                    "th",
                    tag("a", tag("code", each.code), href=f"#{each.code}"),
                    tag("small", known.meaning),
                    scope="row",
                ),
                tag("td", f"{each.count:,}", limit, class_="count"),
                tag("td", f"{example.id} · {example.source}", class_="example", dir="auto"),
                tag("td", known.advice, class_="advice"),
            )
        )
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", title, scope="col") for title in titles))),
        tag("tbody", *lines),
        class_="codes",
    )
    return tag("div", table, class_="card")


def _tokens(lengths: Lengths) -> Html:
    summary = lengths.summary()
    if not summary:
        return Html("")
    rows = [("text", summary["text"]), ("image", summary["visual"])]
    rows += [("trained", summary["trained"]), ("all", summary)]
    names = ("p50", "p95", "max", "total")
    table = tag(
        "table",
        tag("thead", tag("tr", tag("th", ""), *(tag("th", name, scope="col") for name in names))),
        tag(
            "tbody",
            *(
                tag(
                    "tr",
                    tag("th", kind, scope="row"),
                    *(tag("td", f"{values[name]:,}") for name in names),
                )
                for kind, values in rows
            ),
        ),
        class_="lengths",
    )
    keys = [tag("span", "text", class_="key text"), " ", tag("span", "image", class_="key image")]
    caption = tag("figcaption", tag("b", "Rows by length"), " ", *keys)
    chart = tag("figure", caption, histogram(lengths), class_="curve histogram")
    return tag("div", chart, tag("div", table, class_="card"), class_="two")


def histogram(lengths: Lengths) -> Html:
    """Rows by their tokens; each bar is divided as their tokens are."""
    total = lengths.total
    top = float(total.max()) + 1
    step = round_step(top, BARS)
    bars = math.ceil(top / step)
    place = (total // step).astype(int)
    rows = np.bincount(place, minlength=bars)
    visual = np.bincount(place, weights=lengths.visual, minlength=bars)
    every = np.bincount(place, weights=total, minlength=bars)
    width, height = PLOT
    bar, highest = width / bars, float(rows.max())
    parts = []
    for number in range(bars):
        if not rows[number]:
            continue
        tall = max(height * rows[number] / highest, 1.5)
        image = tall * visual[number] / every[number]
        low, high = int(number * step), int((number + 1) * step) - 1
        words = f"{low:,} to {high:,} tokens: {rows[number]:,} rows"
        left = {"x": f"{number * bar + 0.5:.1f}", "width": f"{bar - 1:.1f}"}
        parts.append(
            tag(
                "g",
                tag("title", words),
                _bar(left, height - tall, tall - image, "text"),
                _bar(left, height - image, image, "image"),
            )
        )
    ticks = [
        tag("text", f"{value:,.0f}", x=f"{value / step * bar:.1f}", y=f"{height + 18:.0f}")
        for value in np.arange(0, top, round_step(top, 6))
    ]
    axis = tag(
        "line", x1="0", x2=f"{width:.0f}", y1=f"{height:.0f}", y2=f"{height:.0f}", class_="axis"
    )
    return tag(
        "svg", *parts, axis, *ticks, viewBox=f"0 0 {width + 20:.0f} {height + 24:.0f}", role="img"
    )


def _bar(left: dict[str, str], top: float, tall: float, kind: str) -> Html:
    if tall < 0.05:
        return Html("")
    return tag("rect", **left, y=f"{top:.1f}", height=f"{tall:.1f}", class_=kind)


def _classes(result: CheckResult) -> Html:
    if not result.classes:
        return Html("")
    most = max(result.classes.values())
    parts: list[Html] = []
    for label, count in list(result.classes.items())[:CLASSES]:
        bar = tag("div", class_="bar", style=f"width:{100 * count / most:.1f}%")
        parts += [
            tag("span", label or "(empty)", class_="name", dir="auto"),
            bar,
            tag("span", f"{count:,} · {count / result.rows:.1%}", class_="muted"),
        ]
    more = len(result.classes) - CLASSES
    rest = tag("p", f"and {more:,} rarer classes", class_="muted") if more > 0 else ""
    return group([tag("div", *parts, class_="card classes"), rest])


def _gallery(count: CodeCount, findings: Sequence[Finding], rows: AllRows) -> Html:
    known = code_of(count.code)
    lead = f"{known.meaning[:1].upper()}{known.meaning[1:]}. What to do: {known.advice}."
    shown = [_card(finding, rows) for finding in findings[:SHOWN]]
    more = count.count - len(shown)
    return group(
        [
            tag("p", lead, class_="lead"),
            tag("div", *shown, class_="grid"),
            tag("p", f"and {more:,} more (--json lists them)", class_="also") if more else "",
        ]
    )


def _card(finding: Finding, rows: AllRows) -> Html:
    row = rows.at(finding.place)
    where = finding.source
    if finding.place != finding.source:
        where = f"{finding.place} · {finding.source}"
    header = tag(
        "header", tag("h4", finding.id, dir="auto"), tag("span", where, class_="where", dir="auto")
    )
    if finding.other:
        twin = rows.at(finding.other)
        shown = tag(
            "div",
            _side(row, finding.place),
            _side(twin, finding.other),
            class_="pair",
        )
    else:
        shown = group([_pictures(row), _answer(row)])
    return tag(
        "article", header, tag("p", finding.message, class_="found", dir="auto"), shown,
        class_="row wide" if finding.other else "row",
    )  # fmt: skip


def _side(row: Conversation, place: str) -> Html:
    return tag("figure", tag("figcaption", f"{row.id} · {place}"), _pictures(row), _answer(row))


def _answer(row: Conversation) -> Html:
    text = row.answer
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} … and {len(text) - LONGEST:,} more characters"
    return tag("p", text, class_="answer", dir="auto") if text else Html("")


def _pictures(row: Conversation) -> Html:
    boxes = [part for part in row.parts() if isinstance(part, Box)]
    drawn = [
        _picture(image.data, [box for box in boxes if box.image == number], row.id)
        for number, image in enumerate(row.images[:IMAGES])
    ]
    more = len(row.images) - IMAGES
    return group([*drawn, tag("p", f"and {more} more images", class_="muted") if more > 0 else ""])


def _picture(data: bytes, boxes: Sequence[Box], name: str) -> Html:
    try:
        picture = open_image(data, ImagePolicy())
    except DataError as error:
        return tag("p", f"The picture cannot be shown ({error.code}).", class_="muted")
    whole = picture.width
    picture.thumbnail((SIDE, SIDE))
    scale = picture.width / whole
    marks = [Mark(box.label, _scaled(box, scale)) for box in boxes]
    size = Size(*picture.size)
    return tag(
        "div",
        drawing(data_uri(picture), size, marks, alt=f"picture of {name}"),
        class_="picture",
    )


def _scaled(box: Box, scale: float) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (value * scale for value in box.xyxy)
    return x1, y1, x2, y2
