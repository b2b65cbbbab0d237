"""How the training went: curves, and which parts of the model it reached."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlmtune.evaluation.markup import Html, group, tag
from vlmtune.evaluation.metrics import METRICS, find
from vlmtune.evaluation.plots import Point, Series, curve, points_of
from vlmtune.evaluation.report_content import ReportContent
from vlmtune.evaluation.report_words import metric_words


def training_section(content: ReportContent) -> Html:
    """Curves, what the first gradients showed, and what happened on the way."""
    drawn = [drawing for drawing in _curves(content) if drawing]
    if not drawn and not content.trainability:
        return Html("")
    steps = content.steps
    bad = [row for row in steps if _is_not_finite(row)]
    warning = (
        f"Loss or gradients were not finite in {len(bad):,} of {len(steps):,} steps, which the "
        "curves leave out."
    )
    return group(
        [
            tag("p", warning, class_="fails") if bad else "",
            *_history(content.history),
            tag("div", *drawn, class_="curves") if drawn else "",
            *_trainability(content.trainability),
        ]
    )


def _curves(content: ReportContent) -> Iterator[Html]:
    steps = content.steps
    loss = Series("loss", points_of(steps, "loss"))
    probe = Series("probe rows", points_of(steps, "probe_loss"), dots=True)
    yield curve("Loss", "per trained token", [loss, probe])
    yield curve("Learning rate", "", learning_rates(steps, content.rates), smoothed=False)
    norm = Series("", points_of(steps, "gradient_norm"))
    clipped = f"before clipping at {content.clip:g}" if content.clip else "not clipped"
    yield curve("Gradient norm", clipped, [norm], limit=content.clip or None)
    yield from _probes(probe_points(steps))
    rate = Series("", points_of(steps, "samples_per_second"))
    yield curve("Throughput", "samples a second", [rate])


def probe_points(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Metrics of the probe's answers during training: (step, value) by metric."""
    measured = [
        {"step": step.get("step"), **step["probe_metrics"]}
        for step in steps
        if isinstance(step.get("probe_metrics"), Mapping)
    ]
    names = {name for record in measured for name in record}
    return {name: points_of(measured, name) for name in METRICS if name in names}


def _probes(probes: Mapping[str, Sequence[Point]]) -> Iterator[Html]:
    """Metrics of shares in one picture, the others in one each."""
    shares = [name for name in probes if find(name).range == (0.0, 1.0)]
    if shares:
        lines = [
            Series(metric_words(name), probes[name], colour=number)
            for number, name in enumerate(shares, start=1)
        ]
        yield curve("On the probe", "", lines, smoothed=False)
    for name in probes:
        if name not in shares:
            unit = "higher is better" if find(name).higher_is_better else "lower is better"
            line = Series("", probes[name])
            yield curve(f"{metric_words(name)} on the probe", unit, [line], smoothed=False)


def learning_rates(steps: Sequence[Mapping[str, Any]], rates: Mapping[str, float]) -> list[Series]:
    """The logged learning rate, or that of each part where they differ."""
    logged = points_of(steps, "learning_rate")
    if len(set(rates.values())) <= 1:
        factor = next(iter(rates.values()), 1.0)
        return [Series("", [(step, value * factor) for step, value in logged])]
    return [
        Series(part, [(step, value * factor) for step, value in logged], colour=number)
        for number, (part, factor) in enumerate(rates.items(), start=1)
    ]


def _is_not_finite(step: Mapping[str, Any]) -> bool:
    """Whether a step was not applied; a run logs no value then, as JSON has no NaN."""
    logged = step.get("loss") is not None
    return step.get("applied") is False or (logged and not points_of([step], "loss"))


def _history(lines: Sequence[str]) -> Iterator[Html]:
    if lines:
        yield tag("h3", "On the way")
        yield tag("ul", *(tag("li", line, dir="auto") for line in lines), class_="remarks")


def _trainability(parts: Sequence[Mapping[str, Any]]) -> Iterator[Html]:
    if not parts:
        return
    titles = ("Part", "Weights", "Trained", "Gradient", "Seen at step", "")
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", title, scope="col") for title in titles))),
        tag("tbody", *map(_part, parts)),
        class_="metrics parts stacked",
    )
    lead = (
        "What the first gradients showed of each part. The run stops where a part that should "
        "train gets none, or one that should stay as it is gets one."
    )
    yield tag("h3", "Which parts trained")
    yield tag("p", lead, class_="lead")
    yield tag("div", table, class_="card")


def _part(part: Mapping[str, Any]) -> Html:
    whole, trained = int(part["parameters"]), int(part["trainable"])
    norm, step = part.get("gradient_norm"), part.get("step")
    share = f" ({_percent(trained / whole)})" if trained and whole else ""
    idle = int(part.get("without_gradient", 0))
    if not trained:
        badge, words = "plain", "frozen"
    elif step is None:
        badge, words = "worse", "not seen"
    elif idle:
        badge, words = "none", f"{idle:,} tensors without a gradient"
    else:
        badge, words = "better", "trains"
    return tag(
        "tr",
        tag("th", str(part["part"]), scope="row"),
        tag("td", f"{whole:,}", data_label="Weights"),
        tag("td", f"{trained:,}{share}" if trained else "–", data_label="Trained"),
        tag("td", _norm(norm), data_label="Gradient"),
        tag("td", f"{step:,}" if step is not None else "–", data_label="Seen at step"),
        tag("td", tag("span", words, class_=f"badge {badge}")),
    )


def _norm(norm: float | None) -> str:
    return f"{norm:.3g}" if norm is not None and math.isfinite(norm) else "–"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
