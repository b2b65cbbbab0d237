from __future__ import annotations

import csv
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pytest
from PIL import Image

from vlmtune.formulas import (
    FormulaError,
    Node,
    formulas,
    latex,
    random_formula,
    random_tree,
    render,
    said,
    split_of,
    write_formula_table,
)


def test_a_picture_is_black_on_white_with_its_padding():
    picture = render(r"\frac { 1 } { 2 }", padding=5)
    assert picture.mode == "L"
    ink = np.asarray(picture) < 128
    assert ink.any()
    assert not ink[:5].any()
    assert not ink[-5:].any()
    assert not ink[:, :5].any()
    assert not ink[:, -5:].any()
    assert ink.mean() < 0.5
    outer = np.asarray(picture)[5:-5, 5:-5] < 255
    assert outer[0].any()
    assert outer[:, 0].any()


def test_different_formulas_look_different_and_equal_ones_equal():
    assert render(r"\frac { x ^ { 2 } } { 3 }") == render(r"\frac{x^2}{3}")
    assert render(r"\sum _ { i = 1 } ^ { n } i") == render(r"\sum_{i=1}^{n} i")
    assert render("x ^ { 2 }").height > render("x 2").height  # raised, and not beside it
    assert render("x ^ { 2 }") != render("x _ { 2 }")
    assert render("x", font="stix") != render("x")


def test_size_and_resolution_scale_the_picture():
    plain, large = render("x + y", padding=0), render("x + y", padding=0, size_points=28)
    assert large.height == pytest.approx(2 * plain.height, rel=0.15)
    assert render("x + y", padding=0, dpi=300).width == pytest.approx(2 * plain.width, rel=0.15)


@pytest.mark.parametrize(
    "latex",
    ["", "  ", r"\frac { 1", r"\unknown { x }", "a $ b", r"\\$ x", "x _", r"\quad", "}"],
)
def test_what_cannot_be_drawn_says_so(latex):
    with pytest.raises(FormulaError) as caught:
        render(latex)
    assert "\n" not in str(caught.value)


def test_an_escaped_dollar_is_drawn():
    assert render(r"5 \$").width > render("5").width


def test_formulas_are_distinct_drawable_tokens_and_repeat_with_the_seed():
    first = formulas(200, seed=1)
    assert first == formulas(200, seed=1)
    assert len(set(first)) == 200
    assert first != formulas(300, seed=2)
    for formula in first:
        assert formula == " ".join(formula.split())
        assert formula.count("{") == formula.count("}")
        assert render(formula).width > 16
    text = " ".join(first)
    for token in (r"\frac", r"\sqrt", r"\sum", r"\int", r"\alpha", r"\sin", "^", "_", r"\left("):
        assert token in text


def test_excluded_formulas_do_not_return():
    first = formulas(50, seed=3)
    assert not set(formulas(50, seed=3, exclude=first)) & set(first)


def test_a_tree_is_written_and_said_in_the_same_order():
    sub = Node("sub", (Node("a"), Node("1")))
    tree = Node("row", (Node("fraction", (sub, Node(r"\beta"))), Node("="), Node(r"\Gamma")))
    assert latex(tree) == r"\frac { a _ { 1 } } { \beta } = \Gamma"
    assert said(tree) == "fraction a sub 1 end over beta end equals big gamma"


def test_what_is_said_tells_formulas_apart_and_is_not_latex():
    rng = random.Random(4)
    trees = [random_tree(rng, rng.randint(1, 12)) for _ in range(3000)]
    pairs = {(latex(tree), said(tree)) for tree in trees}
    assert len({words for _, words in pairs}) == len(pairs) == len({text for text, _ in pairs})
    spoken = " ".join(words for _, words in pairs)
    assert not set("\\{}^_") & set(spoken)


def test_formulas_are_not_trivial():
    held_out = formulas(300, seed=5, split="held_out")
    tokens = [formula.split() for formula in held_out]
    assert statistics.median(map(len, tokens)) >= 20
    marked = [any(mark in own for mark in (r"\frac", r"\sqrt", "_", "^")) for own in tokens]
    assert sum(marked) >= 0.6 * len(marked)
    assert len({token for own in tokens for token in own if token.startswith("\\")}) >= 40


def test_no_two_splits_share_a_formula():
    shares = {split: formulas(60, seed=1, split=split) for split in ("training", "held_out")}
    for split, own in shares.items():
        assert {split_of(formula) for formula in own} == {split}
        assert {split_of(formula.replace(" ", "")) for formula in own} == {split}
    everything = [split_of(formula) for formula in formulas(3000, seed=2)]
    assert 0.82 < everything.count("pretraining") / 3000 < 0.88
    assert 0.08 < everything.count("training") / 3000 < 0.12


def test_the_seed_decides_across_processes():
    code = "from vlmtune.formulas import formulas; print(formulas(5, 7))"
    run = [sys.executable, "-c", code]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(formulas(5, 7))


def test_the_table(tmp_path):
    table = write_formula_table(tmp_path / "a", 12, seed=5)
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == formulas(12, 5)
    assert rows[3]["image"] == "images/000003.png"
    for row in rows:
        with Image.open(tmp_path / "a" / row["image"]) as stored:
            assert np.array_equal(stored, render(row["text"]))
    again = write_formula_table(tmp_path / "b", 12, seed=5)
    assert again.read_bytes() == table.read_bytes()
    picture = "images/000011.png"
    assert (tmp_path / "a" / picture).read_bytes() == (tmp_path / "b" / picture).read_bytes()


def test_fifty_a_second():
    rows = [random_formula(random.Random(seed)) for seed in range(60)]
    render("x")  # fonts are read once
    start = time.process_time()
    for row in rows:
        render(row)
    assert len(rows) / (time.process_time() - start) >= 50


def test_threads_and_settings_do_not_meet():
    before = dict(matplotlib.rcParams)
    rows = formulas(40, seed=9)
    alone = [render(row) for row in rows]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(render, rows)) == alone
    assert dict(matplotlib.rcParams) == before
