"""Several runs on one page: how they stand, metrics beside each other, curves, what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from vlmtune.evaluation.comparison import (
    Ranking,
    RunLine,
    best_names,
    differing,
    metric_names,
)
from vlmtune.evaluation.markup import Html, group, tag
from vlmtune.evaluation.metrics import METRICS, find
from vlmtune.evaluation.page import document
from vlmtune.evaluation.plots import Series, curve, palette, points_of, whiskers
from vlmtune.evaluation.report_results import bracketed, claim, scale_end
from vlmtune.evaluation.report_style import STYLE
from vlmtune.evaluation.report_training import probe_points
from vlmtune.evaluation.report_words import (
    DASH,
    counted,
    difference_words,
    duration,
    estimate_words,
    metric_words,
)

MOST_CURVES = 12  # runs in a picture
LONGEST_VALUE = 60  # characters of an option's value
BADGES = {"finished": "better", "running": "plain", "stopped": "none", "damaged": "worse"}

OWN_STYLE = """
table.runs td, table.runs th { padding: 9px 12px; font-size: 14px; overflow-wrap: break-word; }
table.runs th { min-width: 90px; } table.runs thead th { min-width: 0; }
table.runs th a { color: inherit; }
table.runs td.state { max-width: 240px; }
table.metrics td.state small { white-space: normal; }
table.options td { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: 13px; min-width: 110px; max-width: 260px; }
table.options thead th, table.options tbody th { overflow-wrap: anywhere; min-width: 130px; }
table.options tbody th { position: sticky; left: 0; background: var(--card); }
td.differs { background: var(--none-soft); color: var(--none); font-weight: 620; }
.best { color: var(--better); }
@media (max-width: 720px) {
  table.runs td, table.runs th { padding: 3px 0; }
  table.runs td.state { max-width: none; }
  table.options tbody th { position: static; }
}
"""


def comparison_html(title: str, lines: Sequence[RunLine], rankings: Sequence[Ranking] = ()) -> str:
    """The page; the same runs give the same bytes.

    Args:
        title: What is compared.
        lines: The runs, in the order in which they are shown; each keeps its colour.
        rankings: Comparisons on the same rows.
    """
    sections = [
        ("runs", "Runs", _runs(lines)),
        ("metrics", "Metrics", _metrics(lines, rankings)),
        ("curves", "Curves", _curves(lines)),
        ("options", "What differs", _options(lines)),
    ]
    return document(
        kind="vlmtune runs",
        title=title,
        heading=tag("h1", title, dir="auto"),
        top=[_summary(lines)],
        sections=sections,
        style=STYLE + OWN_STYLE,
    )


def _summary(lines: Sequence[RunLine]) -> Html:
    kinds = [
        f"{sum(line.kind == kind for line in lines):,} {kind}"
        for kind in BADGES
        if any(line.kind == kind for line in lines)
    ]
    parts = [f"{counted(len(lines), 'run')}: {', '.join(kinds)}."]
    data = {line.fingerprint for line in lines if line.fingerprint}
    if len(data) > 1:
        parts.append(
            f"They were trained on {len(data):,} different data sets: values of runs on different "
            "rows cannot be compared."
        )
    return tag("p", " ".join(parts), class_="lead")


def _key(lines: Sequence[RunLine], line: RunLine) -> Html:
    number = palette(list(lines).index(line) + 1)
    return tag("span", line.name, class_=f"key line s{number}", dir="auto")


def _runs(lines: Sequence[RunLine]) -> Html:
    titles = ("Run", "State", "Base and data", "Steps", "Time", "Headline metric", "Difference", "")
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", title, scope="col") for title in titles))),
        tag("tbody", *(_run(lines, line) for line in lines)),
        class_="metrics runs stacked",
    )
    return tag("div", table, class_="card wide")


def _run(lines: Sequence[RunLine], line: RunLine) -> Html:
    before, after = line.before.get(line.metric), line.after.get(line.metric)
    values = [estimate_words(each).partition(" ")[0] for each in (before, after) if each]
    rate = f"{line.samples_per_second:,.2f} samples /s" if line.seconds else ""
    measured = group(
        [
            tag("span", metric_words(line.metric) if line.metric else DASH, class_="muted"),
            " ",
            tag("span", " → ".join(values), class_="value"),
        ]
    )
    badge = tag("span", line.kind, class_=f"badge {BADGES[line.kind]}")
    words = "" if line.state == line.kind else tag("small", line.state, dir="auto")
    base = group([line.base or DASH, tag("small", f"{line.data} · {line.method}")])
    return tag(
        "tr",
        tag("th", _key(lines, line), scope="row"),
        tag("td", tag("span", badge, words), class_="state", data_label="State"),
        tag("td", tag("span", base, dir="auto"), data_label="Base"),
        tag("td", f"{line.step:,}", data_label="Steps"),
        tag("td", duration(line.seconds), tag("small", rate), data_label="Time"),
        tag("td", tag("span", measured), data_label="Metric"),
        tag("td", bracketed(difference_words(line.difference)), data_label="Difference"),
        tag("td", claim(line.difference)),
    )


def _metrics(lines: Sequence[RunLine], rankings: Sequence[Ranking]) -> Html:
    names = metric_names(lines)
    if not names:
        return Html("")
    lead = (
        "Values after training with 95 % intervals; the best is marked. Values may be compared "
        "only between runs that were measured on the same rows."
    )
    return group(
        [
            tag("p", lead, class_="lead"),
            *(_metric(name, lines) for name in names),
            *map(_ranking, rankings),
        ]
    )


def _metric(name: str, lines: Sequence[RunLine]) -> Html:
    measured = [line for line in lines if name in line.before or name in line.after]
    best, metric = best_names(lines, name), find(name)
    end = scale_end(each.get(name) for line in measured for each in (line.before, line.after))
    rows = [
        tag(
            "tr",
            tag("th", _key(lines, line), scope="row"),
            tag("td", bracketed(estimate_words(line.before.get(name))), data_label="Before"),
            tag("td", bracketed(estimate_words(line.after.get(name))), data_label="After"),
            tag("td", tag("span", "best", class_="badge better") if line.name in best else ""),
            tag(
                "td",
                whiskers(
                    [
                        ("before", line.before.get(name)),
                        (f"s{palette(list(lines).index(line) + 1)}", line.after.get(name)),
                    ],
                    end,
                ),
            ),
        )
        for line in measured
    ]
    direction = "higher is better" if metric.higher_is_better else "lower is better"
    heads = [tag("th", title, scope="col") for title in ("Run", "Before", "After", "", "")]
    table = tag(
        "table",
        tag("thead", tag("tr", *heads)),
        tag("tbody", *rows),
        class_="metrics stacked",
    )
    return group(
        [
            tag("h3", metric_words(name)),
            tag("p", f"{metric.meaning}; {direction}", class_="muted"),
            tag("div", table, class_="card"),
        ]
    )


def _ranking(ranking: Ranking) -> Html:
    lead = (
        f"{metric_words(ranking.metric)} of each run minus that of the best, {ranking.best}, on "
        f"the same {counted(ranking.rows, 'row')}: where no difference can be claimed, the runs "
        "may be equally good."
    )
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row", dir="auto"),
            tag("td", bracketed(difference_words(difference)), data_label="Difference"),
            tag("td", claim(difference)),
        )
        for name, difference in ranking.differences.items()
    ]
    table = tag("table", tag("tbody", *rows), class_="metrics stacked")
    return group(
        [
            tag("h3", f"Compared with {ranking.best}", dir="auto"),
            tag("p", lead, class_="lead"),
            tag("div", table, class_="card"),
        ]
    )


def _curves(lines: Sequence[RunLine]) -> Html:
    figures = [figure for figure in _figures(lines) if figure]
    if not figures:
        return Html("")
    words = f"Of {len(lines):,} runs, the last {MOST_CURVES} are drawn."
    return group(
        [
            tag("p", words, class_="lead") if len(lines) > MOST_CURVES else "",
            tag("div", *figures, class_="curves"),
        ]
    )


def _figures(lines: Sequence[RunLine]) -> Iterator[Html]:
    shown = list(enumerate(lines, start=1))[-MOST_CURVES:]
    for key, title, unit, noisy in (
        ("loss", "Loss", "per trained token", True),
        ("probe_loss", "Loss on the probe", "per trained token", False),
        ("learning_rate", "Learning rate", "", False),
        ("gradient_norm", "Gradient norm", "before clipping", True),
        ("samples_per_second", "Throughput", "samples a second", True),
    ):
        series = [Series(line.name, points_of(line.steps, key), number) for number, line in shown]
        yield curve(title, unit, series, smoothed=noisy)
    probes = {number: probe_points(line.steps) for number, line in shown}
    for name in METRICS:
        series = [Series(line.name, probes[number].get(name, ()), number) for number, line in shown]
        yield curve(f"{metric_words(name)} on the probe", "", series, smoothed=False)


def _options(lines: Sequence[RunLine]) -> Html:
    found = differing(lines)
    if sum(bool(line.options) for line in lines) < 2:
        return Html("")
    if not found:
        return tag("p", "No option of the recipes differs.", class_="lead")
    head = [tag("th", "Option", scope="col")]
    head += [tag("th", _key(lines, line), scope="col") for line in lines]
    rows = [
        tag("tr", tag("th", name, scope="row"), *(_option(*value) for value in values))
        for name, values in found.items()
    ]
    lead = "Options in which the recipes differ; marked is what is not the commonest value."
    table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows), class_="options")
    return group([tag("p", lead, class_="lead"), tag("div", table, class_="card wide")])


def _option(value: Any, differs: bool) -> Html:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > LONGEST_VALUE:
        text = f"{text[: LONGEST_VALUE - 1]}…"
    return tag("td", text, class_="differs" if differs else None, dir="auto")
