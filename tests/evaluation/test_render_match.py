"""Formulas compared as pictures: equal ones, other spellings, wrong ones, and such as have none."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from vlmtune.errors import DataError
from vlmtune.evaluation import rendering
from vlmtune.evaluation.latex import FONTS, FUNCTIONS, SIZES, SWITCHES, TOKEN, normalise_latex
from vlmtune.evaluation.metric import row_score, statistics, value
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.render_match import _gains, _offset, _placed, _squeezed, agreement
from vlmtune.evaluation.rendering import Drawer, Ink, ink
from vlmtune.evaluation.run import Prediction, scored
from vlmtune.formulas import formulas

METRIC = find("render_match")
VISIBLE = FONTS | SIZES | FUNCTIONS | SWITCHES.keys()  # what one spelling may show in print


def drawn(latex: str) -> Ink:
    picture = ink(latex)
    assert picture is not None, latex
    return picture


def score(one: str, other: str) -> float:
    return agreement(drawn(one), drawn(other))


def some(rows: int) -> list[str]:
    return formulas(rows, seed=11)


def test_ink_is_cropped():
    picture = drawn(r"\frac { 1 } { 2 }")
    assert picture.dtype == np.bool_
    assert all(edge.any() for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]))
    assert 0.05 < picture.mean() < 0.6


def test_equal_formulas_score_one_and_others_little():
    rows = some(24)
    assert [score(row, row) for row in rows] == [1.0] * 24
    others = [score(row, other) for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]
    assert np.mean(others) < 0.25
    assert max(others) < 0.6


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{x^2}{3}", r"\frac { x ^ { 2 } } { 3 }"),
        ("a + b", r"a + b \quad"),
        (r"a = b , c = d", r"a = b , \quad c = d"),
        (r"x ^ { \prime }", "x'"),
        (r"{ x } + { { y } }", "x + y"),
    ],
)
def test_another_spelling_is_the_same_formula(one, other):
    assert score(one, other) == 1.0
    assert score(other, one) == 1.0


def test_a_glyph_costs_about_its_own_ink():
    whole = r"a + b + c + d + e + f = g + h"
    wrong = score(whole, whole.replace("d", "m"))
    two_wrong = score(whole, whole.replace("d", "m").replace("b", "w"))
    missing = score(whole, whole.replace("+ f", ""))
    assert 0.85 < wrong < 1.0
    assert two_wrong < wrong
    assert 0.8 < missing < 1.0
    assert score(whole, "x") < 0.2


def test_a_script_is_no_base():
    assert score("x ^ { 2 }", "x 2") < 0.9
    assert score("x ^ { 2 }", "x _ { 2 }") < 0.9
    assert score(r"\frac { a } { b }", "a b") < 0.3


def test_it_is_the_best_pairing_of_columns():
    """Against the definition written out: every offset near the best, and a plain table."""
    rows = some(8)
    draw = random.Random(0)

    def changed(text: str) -> str:
        return " ".join(
            draw.choice("abcxyz") if word.isalnum() and draw.random() < 0.3 else word
            for word in text.split()
        )

    for row in rows:
        first, second = _squeezed(drawn(row)), _squeezed(drawn(changed(row)))
        best = 0.0
        for near in range(-2, 3):
            gains = _gains(*_placed(first, second, _offset(first, second) + near))
            table = np.zeros((gains.shape[0] + 1, gains.shape[1] + 1))
            for i, j in np.ndindex(gains.shape):
                table[i + 1, j + 1] = max(
                    table[i, j + 1], table[i + 1, j], table[i, j] + gains[i, j]
                )
            best = max(best, table[-1, -1])
        expected = best / float(first.sum() + second.sum())
        assert agreement(first, second) == pytest.approx(expected, abs=1e-6)
        assert agreement(second, first) == pytest.approx(expected, abs=1e-6)
        assert 0.0 <= expected <= 1.0


# What cannot be drawn


@pytest.mark.parametrize(
    "latex",
    [
        "", r"\frac { 1", r"\nosuchcommand { x }", "{" * 2000 + "x" + "}" * 2000,
        r"\frac{" * 3000, "a + b = " * 300, "\x00",
    ],
    ids=["empty", "cut", "unknown", "deep", "open", "wide", "null"],
)  # fmt: skip
def test_what_cannot_be_drawn_has_no_ink(latex):
    assert ink(latex) is None
    assert ink("x") is not None  # and the next one has


def test_the_process_may_die_or_hang_of_a_formula(monkeypatch):
    drawer = Drawer()
    try:
        drawn = drawer.draw("x")
        assert drawn is not None
        assert drawer._process is not None
        first = drawer._process.pid
        drawer._process.kill()
        drawer._process.wait()
        assert drawer.draw("x") == drawn  # it died of nothing that it was asked: drawn anew
        assert drawer._process.pid != first
        second = drawer._process
        os.kill(second.pid, signal.SIGSTOP)
        threading.Timer(0.2, second.kill).start()
        assert drawer.draw("x") is None  # what it dies of cannot be drawn
        assert drawer.draw("x") == drawn
        monkeypatch.setattr(rendering, "WALL_SECONDS", 0.1)
        os.kill(drawer._process.pid, signal.SIGSTOP)
        assert drawer.draw("y") is None
        assert drawer._process is None
    finally:
        drawer.close()


def test_a_slow_formula_is_given_up():
    """In a process of its own, where ``render`` is replaced by one that never ends."""
    code = (
        "import vlmtune.formulas, vlmtune.evaluation.rendering as r, sys, os\n"
        "from multiprocessing import Pipe\n"
        "import threading\n"
        "r.PROCESSOR_SECONDS = 0.2\n"
        "def forever(*_, **__):\n"
        "    while True: pass\n"
        "vlmtune.formulas.render = forever\n"
        "ours, theirs = Pipe()\n"
        "def ask():\n"
        "    assert ours.recv_bytes() == b'ready'\n"
        "    ours.send_bytes(b'x')\n"
        "    print(ours.recv_bytes())\n"
        "    ours.close()\n"
        "threading.Thread(target=ask).start()\n"
        "r.main(os.dup(theirs.fileno()))\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "b''", done.stderr
    assert time.monotonic() - started < 60


def test_no_process_outlives_the_program():
    code = (
        "from vlmtune.evaluation.rendering import ink, _DRAWER\n"
        "assert ink('x') is not None\n"
        "print(_DRAWER._process.pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not Path(f"/proc/{done.stdout.strip()}").exists()
    assert done.stderr == ""


def test_a_forked_program_has_a_process_of_its_own():
    assert ink("x") is not None
    ours = rendering._DRAWER._process
    assert ours is not None
    context = multiprocessing.get_context("fork")
    ends = context.Pipe(duplex=False)

    def draw() -> None:
        drawn = ink("forked + 1") is not None
        process = rendering._DRAWER._process
        ends[1].send((drawn, process is not None and process.pid))
        rendering._DRAWER.close()

    child = context.Process(target=draw)
    child.start()
    assert ends[0].poll(60)
    drawn, theirs = ends[0].recv()
    child.join()
    assert drawn
    assert theirs != ours.pid
    assert ours.poll() is None  # and ours lives on
    assert ink("x + 9") is not None


def test_a_formula_is_drawn_once(monkeypatch):
    text = r"\alpha + \beta + 12345"
    drawn(text)
    monkeypatch.setattr(rendering._DRAWER, "draw", lambda _: pytest.fail("drawn again"))
    drawn(f"  {text}\n")


# The metric


def test_undrawable_predictions_count_nothing_and_undrawable_truths_are_left_out():
    predictions = ["x ^ 2", r"\broken{", "y", "z", r"\broken{"]
    references = [["x^{2}"], ["x"], [r"\broken{"], [r"\broken{", "z"], [r"\worse{"]]
    stats = statistics(METRIC, predictions, references)
    assert value(METRIC, stats) == pytest.approx(2 / 3)
    scores = METRIC.alone(stats)
    assert scores[[0, 1, 3]].tolist() == [1.0, 0.0, 1.0]
    assert np.isnan(scores[[2, 4]]).all()
    rows = [
        Prediction(str(n), "?", said, tuple(known), True, 1, 1, {})
        for n, (said, known) in enumerate(zip(predictions, references, strict=True))
    ]
    evaluation = scored(rows, ["render_match", "exact_match"], 9, normalise="latex")
    assert evaluation.details["render_match"] == {
        "rows": 3, "truth_not_rendered": 2, "prediction_not_rendered": 1
    }  # fmt: skip
    assert evaluation.predictions[2].scores.keys() == {"exact_match"}
    assert (
        "render_match: 1 of 3 predictions cannot be drawn and count 0; "
        "2 rows whose truth cannot are left out"
    ) in evaluation.remarks()
    interval = evaluation.metrics["render_match"]
    assert interval.value == pytest.approx(2 / 3)
    assert interval.low < interval.value < interval.high


def test_rows_without_any_drawable_truth_are_refused():
    with pytest.raises(DataError) as caught:
        statistics(METRIC, ["x"], [[r"\broken{"]])
    assert caught.value.code == "nothing_renders"


def test_of_several_references_the_likest_counts():
    assert row_score(METRIC, "x + y", ["a b c", "x + y"]) == 1.0


# Real formulas


@pytest.mark.parametrize("rows", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_real_formulas(rows, shared_data: Path):
    """Truth against itself, its one spelling, one wrong symbol, and another row's truth."""
    table = shared_data / "latex_ocr" / "latex_ocr.csv"
    if not table.is_file():
        pytest.skip(f"{table} is not here")
    with table.open(encoding="utf-8", newline="") as stream:
        texts = [each["text"] for each in csv.DictReader(stream)]
    truths = [text for text in texts[: 2 * rows] if ink(text) is not None][:rows]
    assert len(truths) == rows
    assert [score(text, text) for text in truths] == [1.0] * rows
    # Where the spelling hides nothing that is printed, and can be drawn.
    plain = [text for text in truths if not VISIBLE & set(TOKEN.findall(text))]
    spelled = [(text, ink(normalise_latex(text))) for text in plain]
    alike = [agreement(drawn(text), other) for text, other in spelled if other is not None]
    assert len(alike) >= rows / 4
    assert np.median(alike) == 1.0
    assert np.mean(alike) > 0.97
    others = [score(text, truths[(n + 7) % rows]) for n, text in enumerate(truths)]
    assert np.mean(others) < 0.15
    assert np.quantile(others, 0.95) < 0.35
