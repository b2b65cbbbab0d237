r"""One spelling of a formula: what prints alike is equal, what does not is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmtune.evaluation.latex import normalise_latex
from vlmtune.evaluation.run import Prediction, differences, scored


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{1}{2}", r"\frac { 1 } { 2 }"),
        (r"\frac12", r"\dfrac { 1 } { 2 }"),
        (r"\left( x \right)", "(x)"),
        (r"\bigl[ x \bigr]", "[x]"),
        (r"{ \bf x } _ { 1 }", r"\mathbf{x}_1"),
        (r"\mathrm { R e }", r"{ \rm R e }"),
        (r"x ^ { 2 } \, y \quad z", "x^2y z"),
        (r"$$ a \leq b $$", r"a \le b"),
        (r"{ \cal L } = m", r"\mathcal{L}=m"),
        (r"A ^ { \cal M N }", r"A ^ { \mathcal { M N } }"),
        (r"x '", r"x ^ { \prime }"),
        (r"x''_1", r"x ^ { \prime \prime } _ 1"),
        (r"\sin x", r"\operatorname { s i n } x"),
        (r"{ { x } } + { y z }", "x + y z"),
        (r"\displaystyle \sum \limits _ { i } ^ { n } i", r"\sum_i^n i"),
    ],
)
def test_the_same_print(one, other):
    assert one.split() != other.split()
    assert normalise_latex(one) == normalise_latex(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"x _ { 1 2 }", r"x _ 1 2"),
        (r"\frac { a b } { c }", r"\frac a b c"),
        (r"\mathcal { L }", "L"),
        (r"{ \cal L } = m", r"\mathcal { L = m }"),
        (r"\sqrt { x y }", r"\sqrt x y"),
        ("x ^ { 2 }", "x _ { 2 }"),
        (r"\alpha", r"\beta"),
        ("x", "X"),
        (r"\{ x \}", "{ x }"),
        ("x'", "x"),
        ("x ^ { a } { } ^ { b }", "x ^ { a b }"),
    ],
)
def test_another_print(one, other):
    assert normalise_latex(one) != normalise_latex(other)


@pytest.mark.parametrize("text", ["", "}{", r"\frac {", "{ { }", "\\", "plain words, no formula"])
def test_what_is_no_formula_is_only_cut(text):
    assert normalise_latex(normalise_latex(text)) == normalise_latex(text)
    assert "".join(normalise_latex(text).split()) == "".join(text.split())


def test_real_formulas_keep_their_one_spelling(shared_data: Path):
    table = shared_data / "latex_ocr" / "formulas.txt"
    if not table.is_file():
        pytest.skip(f"{table} is not here")
    lines = table.read_text(encoding="utf-8").splitlines()[::10]
    spelled = [normalise_latex(line) for line in lines]
    assert [normalise_latex(text) for text in spelled] == spelled
    # Nothing collapses: different formulas stay different, but for spellings of one.
    assert len(set(spelled)) >= len(set(lines)) - 2


# In an evaluation


def row(name: str, said: str, *references: str) -> Prediction:
    return Prediction(name, "?", said, references, True, 1, 1, {})


TEXTS = ("exact_match", "edit_similarity", "cer", "bleu")


def test_texts_are_compared_in_one_spelling_and_stored_as_they_are(tmp_path):
    said, truth = r"\frac{1}{2}\left(x\right)", r"\frac { 1 } { 2 } ( x )"
    rows = [row("0", said, truth), row("1", r"\alpha", r"\beta", r"\gamma")]
    raw = scored(rows, TEXTS, 9)
    one = scored(rows, TEXTS, 9, normalise="latex")
    assert raw.metrics["exact_match"].value == 0.0  # negative control
    assert one.metrics["exact_match"].value == 0.5
    assert one.predictions[0].scores == {
        "exact_match": 1.0, "edit_similarity": 1.0, "cer": 0.0, "bleu": pytest.approx(1.0)
    }  # fmt: skip
    assert raw.predictions[0].scores["edit_similarity"] < 0.9
    assert (one.predictions[0].prediction, one.predictions[0].references) == (said, (truth,))
    assert (raw.normalise, one.normalise) == ("none", "latex")
    assert "texts were compared in one spelling (normalise: latex)" in one.remarks()
    one.write(tmp_path / "after")
    assert type(one).read(tmp_path / "after") == one


def test_differences_are_of_the_same_spelling():
    before = [row(str(n), r"\frac{1}{2}", r"\frac { 1 } { 2 }") for n in range(8)]
    after = [row(str(n), r"\frac { 1 } { 2 }", r"\frac { 1 } { 2 }") for n in range(8)]
    assert differences(["exact_match"], before, after)["exact_match"].verdict == "better"
    same = differences(["exact_match"], before, after, normalise="latex")["exact_match"]
    assert (same.value, same.changed, same.verdict) == (0.0, 0, "none")
