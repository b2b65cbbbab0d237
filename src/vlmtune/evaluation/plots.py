"""Small plots as inline SVG that take their colours from the page, so light and dark just work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmtune.evaluation.intervals import Estimate
from vlmtune.evaluation.markup import Html, group, tag

Point = tuple[float, float]

WIDTH, HEIGHT = 480.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 14.0, 12.0, 40.0
MOST_POINTS = 400
SMOOTHED_FROM = 40
COLOURS = 8  # of the style sheet: s1 to s8


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear axis with ticks at round numbers: values low..high to pixels start..end."""

    low: float
    high: float
    step: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Pixel of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round numbers from low to high."""
        first, last = (
            math.ceil(self.low / self.step - 1e-9),
            math.floor(self.high / self.step + 1e-9),
        )
        return [index * self.step for index in range(first, last + 1)]


def round_step(span: float, ticks: int) -> float:
    """The smallest 1, 2 or 5 times a power of ten that gives at most ``ticks`` steps."""
    magnitude = 10.0 ** math.floor(math.log10(span / ticks))
    return next(
        factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude * ticks >= span * 0.999
    )


def value_axis(values: Sequence[float]) -> Axis:
    """Upwards, from 0 where the values come near it."""
    low, high = min(values), max(values)
    if low >= 0 and low < high / 2:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # finer steps are lost in rounding
        low, high = low - abs(low or 1.0) / 2, high + abs(high or 1.0) / 2
    step = round_step(high - low, 4)
    return Axis(
        math.floor(low / step + 1e-9) * step,
        math.ceil(high / step - 1e-9) * step,
        step,
        HEIGHT - BOTTOM,
        TOP,
    )


def step_axis(values: Sequence[float]) -> Axis:
    """To the right, in whole steps."""
    low, high = min(values), max(values)
    if high <= low:
        low, high = low - 1, high + 1
    return Axis(low, high, max(1.0, round_step(high - low, 6)), LEFT, WIDTH - RIGHT)


def tick_words(value: float) -> str:
    """A tick's number: ``0.25``, ``2e-5``, ``12k``."""
    if abs(value) < 1e-12:
        return "0"
    if 10_000 <= abs(value) < 1e9:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    text = f"{value:.4g}" if 0.001 <= abs(value) < 1e9 else f"{value:.2e}"
    if "e" in text:
        digits, power = text.split("e")
        text = f"{float(digits):g}e{int(power)}"
    return text.replace("-", "−", 1) if value < 0 else text


def points_of(steps: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """(step, value) of every logged step that has a finite value."""
    found = [(row.get("step"), row.get(key)) for row in steps]
    return [
        (float(step), float(value))
        for step, value in found
        if isinstance(step, int | float)
        and isinstance(value, int | float)
        and math.isfinite(step)
        and math.isfinite(value)
    ]


def thin(points: Sequence[Point]) -> list[Point]:
    """At most ``MOST_POINTS``, keeping the lowest and highest of each stretch: spikes stay."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MOST_POINTS // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = (
            min(stretch, key=lambda point: point[1]),
            max(stretch, key=lambda point: point[1]),
        )
        kept += sorted(set(ends))
    return kept


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a twentieth of the points, unbiased at the start."""
    keep = 1.0 - 1.0 / max(2.0, len(points) / 20)
    total = weight = 0.0
    smoothed = []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1.0
        smoothed.append((step, total / weight))
    return smoothed


@dataclass(frozen=True, slots=True)
class Series:
    """Values over steps.

    Attributes:
        label: What they are, in the legend; nothing if the title says it.
        points: (step, value).
        colour: Number of its colour, from 1; 0: the page's own.
        dots: Whether they are few and stand apart, and are drawn as dots.
    """

    label: str
    points: Sequence[Point]
    colour: int = 0
    dots: bool = False


def curve(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    smoothed: bool = True,
    limit: float | None = None,
) -> Html:
    """A figure of values over steps; nothing if there is no value.

    Args:
        title: What is drawn.
        unit: Of the values.
        series: The lines.
        smoothed: Whether to draw a moving average over many points; not for what has no noise.
        limit: A value to draw a line across at, where it lies in the picture.
    """
    drawn = [each for each in series if each.points]
    if not drawn:
        return Html("")
    alone = len(drawn) == 1 or all(each.dots for each in drawn[1:])
    if smoothed and not alone:  # beside each other, raw lines hide each other
        drawn = [replace(each, points=_even(each.points)) for each in drawn]
        smoothed = False
    every = [point for each in drawn for point in each.points]
    down = value_axis([value for _, value in every])
    across = step_axis([step for step, _ in every])
    marks = [_marks(each, across, down, smoothed=smoothed) for each in drawn]
    shown = limit is not None and down.low < limit < down.high
    if limit is not None and shown:
        marks.append(_segment(LEFT, down.place(limit), WIDTH - RIGHT, down.place(limit), "limit"))
    drawing = tag(
        "svg",
        tag("title", f"{title} over steps"),
        _frame(across, down),
        *marks,
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
    )
    last = drawn[0].points[-1][1]
    caption = tag(
        "figcaption",
        tag("b", title),
        tag("span", unit, class_="muted"),
        *(key(each) for each in drawn if each.label),
        tag("span", f"last {tick_words(float(f'{last:.3g}'))}" if alone else "", class_="last"),
    )
    return tag("figure", caption, drawing, class_="curve")


def key(series: Series) -> Html:
    """A series in a legend."""
    kind = "dots" if series.dots else "line"
    return tag("span", series.label, class_=f"key {kind} s{palette(series.colour)}")


def palette(number: int) -> int:
    """The colour of a series: 0 is the page's own, then 1 to ``COLOURS`` again and again."""
    return (number - 1) % COLOURS + 1 if number else 0


def _frame(across: Axis, down: Axis) -> Html:
    lines = [
        tag(
            "g",
            _segment(LEFT, down.place(tick), WIDTH - RIGHT, down.place(tick), "grid"),
            _label(LEFT - 8, down.place(tick) + 4, tick_words(tick), "end"),
        )
        for tick in down.ticks
    ]
    ticks = [
        tag(
            "g",
            _segment(across.place(tick), HEIGHT - BOTTOM, across.place(tick), HEIGHT - BOTTOM + 4),
            _label(across.place(tick), HEIGHT - BOTTOM + 18, tick_words(tick), "middle"),
        )
        for tick in across.ticks
    ]
    base = _segment(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM)
    return group([*lines, *ticks, base, _label(WIDTH - RIGHT, HEIGHT - 5, "step", "end")])


def _even(points: Sequence[Point]) -> Sequence[Point]:
    return points if len(points) < SMOOTHED_FROM else smooth(points)


def _marks(series: Series, across: Axis, down: Axis, *, smoothed: bool) -> Html:
    points, colour = series.points, f"s{palette(series.colour)}"
    if series.dots or len(points) == 1:
        return tag("g", *_dots(points, across, down), class_=colour)
    # Beyond as many colours as there are, lines are told apart by their dashes.
    dashes = "7 4" if series.colour > COLOURS else None
    if not smoothed or len(points) < SMOOTHED_FROM:
        return tag("g", _polyline(thin(points), across, down, "line", dashes), class_=colour)
    raw = _polyline(thin(points), across, down, "line faint")
    even = _polyline(thin(smooth(points)), across, down, "line", dashes)
    return tag("g", raw, even, class_=colour)


def _polyline(
    points: Sequence[Point], across: Axis, down: Axis, class_: str, dashes: str | None = None
) -> Html:
    places = " ".join(f"{across.place(x):.1f},{down.place(y):.1f}" for x, y in points)
    return tag("polyline", points=places, class_=class_, stroke_dasharray=dashes)


def _dots(points: Sequence[Point], across: Axis, down: Axis) -> list[Html]:
    return [
        tag("circle", cx=f"{across.place(x):.1f}", cy=f"{down.place(y):.1f}", r="3.5", class_="dot")
        for x, y in points
    ]


def _segment(x1: float, y1: float, x2: float, y2: float, class_: str = "axis") -> Html:
    return tag(
        "line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_
    )


def _label(x: float, y: float, text: str, anchor: str) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def whiskers(estimates: Sequence[tuple[str, Estimate | None]], high: float) -> Html:
    """Values with their intervals below each other, on one scale from 0 to ``high``.

    Args:
        estimates: Class in the style sheet (``before``, ``after``, ``s1``) and value.
        high: End of the scale.
    """
    scale = Axis(0.0, high, high, 6.0, 194.0)
    known = [(class_, estimate) for class_, estimate in estimates if estimate is not None]
    bottom = 7.0 + 14.0 * len(known)
    marks = [
        _whisker(estimate, scale, 11.0 + 14.0 * place, class_)
        for place, (class_, estimate) in enumerate(known)
    ]
    ends = [
        _segment(scale.place(x), 3, scale.place(x), bottom, "grid") for x in (0, high / 2, high)
    ]
    labels = [
        _label(scale.place(x), bottom + 13, tick_words(x), anchor)
        for x, anchor in ((0.0, "start"), (high / 2, "middle"), (high, "end"))
    ]
    return tag(
        "svg",
        *ends,
        *marks,
        *labels,
        viewBox=f"0 0 200 {bottom + 17:g}",
        class_="whiskers",
        aria_hidden="true",
    )


def _whisker(estimate: Estimate, scale: Axis, y: float, class_: str) -> Html:
    span = _segment(scale.place(estimate.low), y, scale.place(estimate.high), y, "span")
    dot = tag("circle", cx=f"{scale.place(estimate.value):.1f}", cy=f"{y:.1f}", r="4.5")
    return tag("g", span, dot, class_=class_)
