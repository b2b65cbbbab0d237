import io
import re

import pytest
from PIL import Image

from report_samples import HIGH, LOW, Page
from tiny_rows import picture
from vlmtune.data.conversation import Box
from vlmtune.evaluation import report_pictures
from vlmtune.evaluation.report import report_html
from vlmtune.evaluation.report_content import ReportContent, ReportRow
from vlmtune.evaluation.report_pictures import are_formulas, bare, marks_of

FORMULA = r"\frac { a _ { 1 } } { b } + \sqrt { x }"


def page_of(*rows: ReportRow, **changes) -> Page:
    content = ReportContent(
        title="t",
        before={"cer": HIGH},
        after={"cer": LOW},
        rows=rows,
        recipe_yaml="a: 1",
        **changes,
    )
    page = Page(report_html(content))
    assert (page.strangers, page.open) == ([], [])
    return page


def boxed(**changes) -> ReportRow:
    values = {
        "id": "1",
        "question": "",
        "truth": ("x",),
        "before": "b",
        "after": "y",
        "score_after": 0.5,
        "true_boxes": [Box(0, "cat", (128, 64, 640, 320)), Box(1, "dog", (0, 0, 10, 10))],
        "boxes_before": [Box(0, "cow", (0, 0, 1280, 640))],
        "boxes_after": [Box(0, "cat", (0, 0, 640, 640))],
        "images": [picture((1280, 640), colour="white").data],
        "pictures": 1,
    }
    return ReportRow(**{**values, **changes})


# Boxes


def test_boxes_are_scaled_with_their_picture():
    page = page_of(boxed())
    (svg,) = [each for each in page.of("svg", role="img") if each.get("width") == "640"]
    assert svg["viewbox"] == "0 0 640 320"
    frames = {
        (f["x"], f["y"], f["width"], f["height"], f["stroke"]) for f in page.of("rect", fill="none")
    }
    assert ("64", "32", "256", "128", report_pictures.TRUE_COLOUR) in frames
    assert ("0", "0", "320", "320", report_pictures.ANSWER_COLOUR) in frames
    dashed = {f["stroke"] for f in page.of("rect", fill="none") if f.get("stroke-dasharray")}
    assert dashed == {report_pictures.ANSWER_COLOUR}
    assert "truth (2)" in page.text
    assert "the answer after training (1)" in page.text
    assert "cow" not in page.text  # of the answer before
    before = page_of(boxed(after=None, score_after=None, score_before=0.1, boxes_after=()))
    assert "the answer before training (1)" in before.text
    assert "cow" in before.text


def test_a_box_is_drawn_on_its_own_picture():
    row = boxed()
    assert [mark.label for mark in marks_of(row, 0, 1, 1)] == ["cat", "cat"]
    assert [mark.label for mark in marks_of(row, 1, 1, 1)] == ["dog"]


def test_boxes_are_in_the_upright_picture():
    """Stored lying; a box around the lower half of the upright picture is drawn there."""
    lying = Image.new("RGB", (400, 200), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    lying.save(file, "JPEG", exif=exif)
    row = boxed(
        images=[file.getvalue()], true_boxes=[Box(0, "", (0, 200, 200, 400))], boxes_after=()
    )
    page = page_of(row)
    (svg,) = [each for each in page.of("svg", role="img") if each.get("width") == "200"]
    assert svg["height"] == "400"
    assert any(f["y"] == "200" and f["height"] == "200" for f in page.of("rect", fill="none"))


def test_small_pictures_with_boxes_are_shown_larger():
    row = boxed(
        images=[picture((60, 40)).data], true_boxes=[Box(0, "", (0, 0, 30, 20))], boxes_after=()
    )
    assert page_of(row).of("svg", width="360")
    assert page_of(boxed(true_boxes=(), boxes_after=())).of("img")


def test_pictures_beyond_the_bounds_are_said_to_be_left_out(monkeypatch):
    rows = [boxed(id=str(n), images=[picture((60, 60)).data] * 2, pictures=7) for n in range(5)]
    page = page_of(*rows)
    assert len(page.of("image")) == 10
    assert page.text.count("and 5 more pictures that are not shown here") == 5
    monkeypatch.setattr(report_pictures, "ALBUM", 50_000)
    page = page_of(*rows)
    assert 0 < len(page.of("image")) < 10
    assert "left out: this page holds no more pictures" in page.text


# Formulas


def formula_row(number: int, before: str, after: str) -> ReportRow:
    return ReportRow(
        id=str(number), question="", truth=(FORMULA,), before=before, after=after, score_after=0.5
    )


def test_formulas_are_set_where_they_can_be():
    page = page_of(
        formula_row(1, r"\frac { a", f"$ {FORMULA} $"),
        formula_row(2, r"\begin{array}{c} 1 \end{array}", "x" * 1300),
    )
    drawn = page.of("img")
    assert [image["alt"] for image in drawn] == [
        "the truth, as a formula",
        "the answer after training, as a formula",
        "the truth, as a formula",
    ]
    assert drawn[0]["src"] == drawn[1]["src"]  # spelled otherwise, and the same formula
    assert page.text.count("cannot be set as a formula") == 2
    assert "not set as a formula: longer than 1,200 characters" in page.text


def test_plain_texts_are_not_set_as_formulas():
    words = ("a red cat", "10^6 files in snake_case", "price: $5", "中文")
    rows = [ReportRow(id=w, question="", truth=(w,), after=w, score_after=1.0) for w in words]
    assert not are_formulas(ReportContent(title="", rows=rows))
    assert page_of(*rows).of("img") == []
    assert are_formulas(ReportContent(title="", rows=[formula_row(1, "", "")]))
    assert not are_formulas(ReportContent(title=""))


def test_formulas_take_no_longer_than_they_may(monkeypatch):
    monkeypatch.setattr(report_pictures, "DRAWING_SECONDS", 0.0)
    page = page_of(formula_row(1, FORMULA, FORMULA))
    assert page.of("img") == []
    assert page.text.count("not set as a formula: the page's bound is reached") == 3


@pytest.mark.parametrize(
    ("text", "inner"),
    [("$x$", "x"), ("$$ x $$", " x "), (r" \[ x \] ", " x "), (r"\( x \)", " x "), ("x", "x")],
)
def test_dollars_around_a_formula_are_not_part_of_it(text, inner):
    assert bare(text) == inner


def test_the_same_pictures_give_the_same_bytes():
    rows = [boxed(), formula_row(2, FORMULA, "x")]
    first, second = (page_of(*rows).source for _ in range(2))
    assert first == second
    assert re.search(r"data:image/(png|jpeg);base64,", first)
