import math
import re

import pytest

from report_samples import Page
from vlmtune.evaluation.plots import Series, curve, points_of, value_axis
from vlmtune.evaluation.report import report_html
from vlmtune.evaluation.report_content import ReportContent


def test_losses_that_are_not_finite_are_left_out_and_counted():
    values = [3.0, math.nan, 2.0, math.inf, 1.0, -math.inf, None]
    steps = [{"step": n, "loss": value} for n, value in enumerate(values, 1)]
    # As a run logs a step that was not applied: without the value.
    steps += [{"step": 8, "applied": False}, {"step": 9, "loss": 0.5, "applied": True}]
    page = Page(report_html(ReportContent(title="", steps=steps)))
    assert "Loss or gradients were not finite in 4 of 9 steps" in page.text
    (line,) = page.of("polyline")
    assert len(line["points"].split()) == 4
    assert not re.search(r"\b(nan|inf)\b", page.source, re.IGNORECASE)
    finite = Page(report_html(ReportContent(title="", steps=[steps[0], steps[-1]])))
    assert "not finite" not in finite.text


def test_the_learning_rate_is_drawn_as_it_was():
    noisy = [(float(step), 1.0 + step % 2) for step in range(1, 101)]
    names = ("loss", "learning_rate", "gradient_norm", "samples_per_second")
    steps = [{"step": step, **dict.fromkeys(names, value)} for step, value in noisy]
    source = report_html(ReportContent(title="", steps=steps))
    lines = {
        figure.split("</b>")[0]: [line["class"] for line in Page(figure).of("polyline")]
        for figure in source.split("<figcaption><b>")[1:]
    }
    smoothed = ["line faint", "line"]
    assert lines == {
        "Loss": smoothed,
        "Learning rate": ["line"],
        "Gradient norm": smoothed,
        "Throughput": smoothed,
    }
    (rate,) = Page(curve("rate", "", [Series("", noisy)], smoothed=False)).of("polyline")
    assert len({point.split(",")[1] for point in rate["points"].split()}) == 2


@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [5.0, 5.0],
        [1e6, 999999.9999999999],
        [1e-30, 3e-30],
        [3.4e38, -1.0],
        [-2.0, -1.0],
        [0.0, 1e-12],
    ],
)
def test_every_value_has_a_place(values):
    axis = value_axis(values)
    assert all(axis.end - 1 <= axis.place(value) <= axis.start + 1 for value in values)
    assert 2 <= len(axis.ticks) <= 9
    points = [(float(step), value) for step, value in enumerate(values)]
    labels = Page(curve("loss", "", [Series("", points)])).inside("text")
    assert all(len(label) <= 9 for label in labels)
    assert points_of([{"step": 1, "loss": "text"}], "loss") == []


