import random

import pytest

from report_samples import HIDDEN, HIGH, LOW, PAYLOADS, Page, outside, spelled
from vlmtune.evaluation.comparison import RunLine as Line
from vlmtune.evaluation.comparison import best_names, differing, metric_names, rankings
from vlmtune.evaluation.comparison_page import MOST_CURVES, comparison_html
from vlmtune.evaluation.intervals import Difference, Estimate
from vlmtune.evaluation.plots import COLOURS
from vlmtune.evaluation.run import Prediction, scored

BETTER = Difference(0.3, 0.2, 0.4, 1.0, 40)


def line(name: str, **changes) -> Line:
    values = {
        "path": f"runs/{name}",
        "kind": "finished",
        "state": "finished",
        "step": 60,
        "base": "org/base",
        "data": "latex",
        "fingerprint": "f",
        "method": "lora",
        "samples": 960,
        "seconds": 60.0,
        "metric": "cer",
        "before": {"cer": HIGH},
        "after": {"cer": LOW, "exact_match": HIGH},
        "difference": BETTER,
        "options": {"name": name, "training.seed": 1, "training.learning_rate": 1e-4},
        "steps": [{"step": n, "loss": 2 / n} for n in range(1, 61)],
    }
    return Line(name=name, **{**values, **changes})


# What differs


def test_options_that_differ_are_marked_where_they_are_not_the_commonest():
    lines = [line(name) for name in "abc"]
    assert differing(lines) == {}
    other = line("d", options={**lines[0].options, "training.seed": 2, "data.path": "/elsewhere"})
    assert differing([*lines, other]) == {
        "training.seed": [(1, False), (1, False), (1, False), (2, True)]
    }
    # Where all differ, none is common; an option that a run does not have counts as differing.
    assert differing([lines[0], other])["training.seed"] == [(1, True), (2, True)]
    lacking = line("e", options={"training.learning_rate": 1e-4})
    assert differing([*lines, lacking])["training.seed"][-1] == (None, True)
    damaged = line("f", options={})
    assert differing([*lines, damaged]) == {}


def test_the_best_is_marked_by_the_metric_s_direction():
    good, bad = Estimate(0.1, 0.0, 0.2), Estimate(0.9, 0.8, 1.0)
    lines = [
        line("a", after={"cer": good, "exact_match": good}),
        line("b", after={"cer": bad, "exact_match": bad}),
    ]
    assert best_names(lines, "cer") == {"a"}
    assert best_names(lines, "exact_match") == {"b"}
    assert best_names(lines[:1], "cer") == set()
    assert best_names([*lines, line("c", after={"cer": good})], "cer") == {"a", "c"}
    assert metric_names(lines) == ["cer", "exact_match"]


# Runs on the same rows


def answered(right: float, seed: int, rows: int = 60, prefix: str = ""):
    draw = random.Random(seed)
    return scored(
        [
            Prediction(
                f"{prefix}{n}", "", "a" if draw.random() < right else "b", ("a",), True, 1, 1, {}
            )
            for n in range(rows)
        ],
        ["accuracy"],
        9,
    )


def test_only_runs_on_the_same_rows_are_compared():
    lines = [line(name, metric="accuracy") for name in ("good", "bad", "alike", "elsewhere")]
    evaluations = {
        "good": answered(0.9, 1),
        "bad": answered(0.3, 2),
        "alike": answered(0.88, 3),
        "elsewhere": answered(1.0, 4, prefix="other "),
    }
    (found,) = rankings(lines, evaluations)
    assert (found.best, found.rows, found.metric) == ("good", 60, "accuracy")
    verdicts = {name: each.verdict for name, each in found.differences.items()}
    assert verdicts == {"bad": "worse", "alike": "none"}
    for name, each in found.differences.items():
        values = [evaluations[n].metrics["accuracy"].value for n in (name, "good")]
        assert each.value == pytest.approx(values[0] - values[1])
    assert rankings(lines[:1], evaluations) == []
    page = Page(comparison_html("runs", lines, [found]))
    assert "of each run minus that of the best, good, on the same 60 rows" in page.text


# The page


def test_every_run_and_every_difference_is_on_the_page():
    lines = [line("first"), line("second", after={}, kind="stopped", state="stopped at step 60")]
    lines.append(line("third", options={"training.seed": 7}, fingerprint="g"))
    page = Page(comparison_html("runs", lines))
    assert (page.strangers, page.open) == ([], [])
    assert "3 runs: 2 finished, 1 stopped." in page.text
    assert "2 different data sets" in page.text
    assert "stopped at step 60" in page.text
    marked = [each for each in page.of("td") if each.get("class") == "differs"]
    assert len(marked) == 2  # seed and learning rate of the third
    assert len(page.of("polyline")) == 3
    same = Page(comparison_html("runs", lines[:2]))
    assert "No option of the recipes differs." in same.text
    assert "different data sets" not in same.text


def test_runs_of_which_little_is_known_are_on_the_page_too():
    bare = Line(name="broken", path="runs/broken", kind="damaged", state="damaged: data.json")
    page = Page(comparison_html("runs", [bare]))
    assert "damaged: data.json" in page.text
    assert page.of("polyline") == []


def test_colours_come_again_with_dashes():
    lines = [line(f"run {number}") for number in range(COLOURS + 6)]
    page = Page(comparison_html("runs", lines))
    assert f"the last {MOST_CURVES} are drawn" in page.text
    drawn = page.of("polyline")
    assert len(drawn) == MOST_CURVES
    assert sum("stroke-dasharray" in each for each in drawn) == 6


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_field_of_a_run_can_say_more_than_its_text(payload):
    def filled(text: str) -> Page:
        return Page(
            comparison_html(
                f"title {text}",
                [
                    line(
                        f"name {n} {text}",
                        state=f"state {text}",
                        base=f"base {text}",
                        data=f"data {text}",
                        method=f"method {text}",
                        options={f"option {text}": f"{n} {text}"},
                        steps=[{"step": 1, "loss": 1.0}],
                    )
                    for n in range(2)
                ],
            )
        )

    page, harmless = filled(payload), filled("word")
    assert (page.strangers, page.open) == ([], [])
    hidden = {("span", "class")}
    shapes = [{s: n for s, n in p.shapes.items() if s not in hidden} for p in (page, harmless)]
    assert shapes[0] == shapes[1]
    assert HIDDEN.findall(page.source) == []
    assert [fault for tag, found in page.elements for fault in outside(tag, found)] == []
    for field in ("title", "name 0", "state", "base", "data", "option"):
        assert spelled(f"{field} {payload}") in page.text
