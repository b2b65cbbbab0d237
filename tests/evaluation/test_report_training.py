import math
import re

import pytest

from report_samples import Page
from vlmtune.evaluation.plots import Series, curve, points_of, value_axis
from vlmtune.evaluation.report import report_html
from vlmtune.evaluation.report_content import ReportContent
from vlmtune.evaluation.report_training import learning_rates, probe_points


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


def page_of(**changes) -> Page:
    steps = [
        {"step": n, "loss": 1 / n, "learning_rate": 1e-4, "gradient_norm": 2.0} for n in (1, 2)
    ]
    page = Page(report_html(ReportContent(**{"title": "", "steps": steps, **changes})))
    assert (page.strangers, page.open) == ([], [])
    return page


def test_each_part_has_the_learning_rate_that_its_weights_had(tmp_path, make_recipe):
    """The curves of the report against the groups of the optimizer, step by step."""
    from vlmtune.runs.folder import RunFolder
    from vlmtune.training import loop
    from vlmtune.training.summary import report_content
    from vlmtune.verbs.train import train

    used: list[set[float]] = []
    real = loop.set_learning_rates

    def noting(optimizer, *rest):
        real(optimizer, *rest)
        used.append({group["lr"] for group in optimizer.param_groups})

    recipe = make_recipe(
        tuning={
            "rank": 4,
            "targets": "all-linear",
            "train": ["vision", "language"],
            "learning_rates": {"vision": 1e-4, "language": None},
        },
        training__schedule="cosine",
        training__warmup_steps=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "set_learning_rates", noting)
        train(recipe, run_dir=tmp_path / "run")
    content = report_content(RunFolder(tmp_path / "run"))
    drawn = {series.label: series.points for series in learning_rates(content.steps, content.rates)}
    assert drawn.keys() == {"vision", "language"}
    for number, rates in enumerate(used):
        of_parts = sorted(points[number][1] for points in drawn.values())
        assert of_parts == pytest.approx(sorted(rates) if len(rates) > 1 else [*rates] * 2)
    assert max(len(rates) for rates in used) == 2
    # Without rates of their own, all parts share the logged one.
    (alone,) = learning_rates(content.steps, {})
    assert alone.points == points_of(content.steps, "learning_rate")


def test_metrics_on_the_probe_are_drawn_with_their_names():
    steps = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0, "probe_metrics": {"exact_match": 0.1, "cer": 0.9, "gone": 1.0}},
        {"step": 4, "loss": 0.5, "probe_metrics": {"exact_match": 0.4, "cer": None}},
        {"step": 6, "loss": 0.4, "probe_metrics": {"exact_match": 0.5, "cer": 0.2}},
    ]
    assert probe_points(steps) == {
        "exact_match": [(2.0, 0.1), (4.0, 0.4), (6.0, 0.5)],
        "cer": [(2.0, 0.9), (6.0, 0.2)],
    }
    page = page_of(steps=steps)
    assert {"Exact match", "CER on the probe"} <= {*page.inside("span"), *page.inside("b")}
    assert len(page.of("polyline")) == 1 + 2


def test_the_limit_of_clipping_is_drawn():
    assert "before clipping at 1.5" in page_of(clip=1.5).text
    assert len(page_of(clip=1.5).of("line", **{"class": "limit"})) == 1
    assert page_of(clip=0.0).of("line", **{"class": "limit"}) == []
    assert "not clipped" in page_of().text


def test_which_parts_trained_is_said():
    part = {"parameters": 1000, "trainable": 50, "gradient_norm": 0.5, "step": 1}
    page = page_of(
        trainability=[
            {"part": "vision", **part, "without_gradient": 2},
            {"part": "projector", **part, "trainable": 0, "gradient_norm": None},
            {"part": "language", **part},
            {"part": "late", **part, "step": None, "gradient_norm": math.inf},
        ]
    )
    badges = [
        text
        for text in page.inside("span")
        if text in ("2 tensors without a gradient", "frozen", "trains", "not seen")
    ]
    assert badges == ["2 tensors without a gradient", "frozen", "trains", "not seen"]
    assert "50 (5 %)" in page.inside("td")
    assert page.inside("td").count("0.5") == 2


def test_lines_beside_each_other_are_smoothed_and_scaled_as_they_are_drawn():
    spiky = [(float(n), 100.0 if n == 50 else 1.0) for n in range(100)]
    two = Page(curve("norm", "", [Series("a", spiky, 1), Series("b", spiky, 2)]))
    one = Page(curve("norm", "", [Series("a", spiky, 1)]))
    assert [line["class"] for line in two.of("polyline")] == ["line", "line"]
    assert [line["class"] for line in one.of("polyline")] == ["line faint", "line"]
    highest = [
        max(float(t.replace("k", "e3")) for t in p.inside("text") if t != "step")
        for p in (two, one)
    ]
    assert highest[0] < highest[1]
