import base64
import io
import math
import random
import re
import time
from dataclasses import replace

import pytest
from PIL import Image

from report_samples import (
    BETTER,
    HIDDEN,
    HIGH,
    LOW,
    PAYLOADS,
    SAME,
    Page,
    complaints,
    expected_texts,
    filled,
    outside,
)
from tiny_rows import picture
from vlmtune.errors import ImageError
from vlmtune.evaluation import markup
from vlmtune.evaluation.intervals import Difference
from vlmtune.evaluation.markup import Html
from vlmtune.evaluation.plots import curve, points_of, value_axis
from vlmtune.evaluation.report import report_html, write_report
from vlmtune.evaluation.report_content import (
    ReportContent,
    ReportRow,
    headline,
    ledger_words,
    ranked,
)
from vlmtune.evaluation.report_rows import LONGEST, differences, faults, thumbnail
from vlmtune.evaluation.report_style import STYLE

HARMLESS = Page(report_html(filled("word")))


def test_it_is_one_file_that_loads_and_runs_nothing():
    page = HARMLESS
    assert complaints(page, page, expected_texts("word")) == []
    assert page.declarations == ["doctype html"]
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "use"}
    (policy,) = page.of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; ")
    assert "script-src" not in policy["content"]
    assert "img-src data:;" in policy["content"]
    assert not re.search(r"@import|url\(|https?:|//", STYLE)
    assert {link["href"] for link in page.of("a")} == {
        f"#{section['id']}" for section in page.of("section")
    }


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_field_can_say_more_than_its_text(payload):
    page = Page(report_html(filled(payload)))
    assert complaints(page, HARMLESS, expected_texts(payload)) == []
    page.source.encode("utf-8")  # a lone surrogate could not be written


@pytest.mark.parametrize(
    "payload", [text for text in PAYLOADS if re.search('[<&"]', text) or HIDDEN.search(text)]
)
def test_without_escaping_it_would_say_more(payload, monkeypatch):
    """Negative control of the test above."""
    monkeypatch.setattr(markup.html, "escape", lambda text, quote=True: text)  # noqa: ARG005
    monkeypatch.setattr(markup, "_is_hidden", lambda character: False)  # noqa: ARG005
    page = Page(report_html(filled(payload)))
    assert complaints(page, HARMLESS, expected_texts(payload)) != []


def test_a_browser_s_title_bar_shows_no_elements():
    source = report_html(filled("user\u202etxt.exe <b>"))
    title = source.partition("<title>")[2].partition("</title>")[0]
    assert title == "title user\\u202etxt.exe &lt;b&gt; – vlmtune report"


def test_enough_is_tried():
    assert len(set(PAYLOADS)) == len(PAYLOADS) >= 30


def test_the_check_for_what_leads_outside_sees_it():
    for attributes in ({"href": "https://x"}, {"src": "//x"}, {"src": "data:image/svg+xml,"}):
        assert outside("a", attributes)
    assert outside("img", {"srcset": "x"})


def test_the_same_content_gives_the_same_bytes(tmp_path):
    first, second = (report_html(filled("word")) for _ in range(2))
    assert first == second
    assert report_html(filled("other")) != first
    write_report(tmp_path / "report.html", filled("word"))
    assert (tmp_path / "report.html").read_bytes() == first.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


# Words


def compared(difference: Difference | None, **changes) -> ReportContent:
    name = changes.pop("metric", "edit_similarity")
    content = ReportContent(
        title="run",
        before={name: LOW},
        after={name: HIGH},
        differences={name: difference} if difference else None,
        rows=[ReportRow(id=str(row), question="", truth=("a",), after="b") for row in range(64)],
    )
    return replace(content, **changes)


@pytest.mark.parametrize(
    ("content", "verdict", "said", "not_said"),
    [
        (compared(BETTER), "better", "Better: +0.310 [0.250, 0.370].", "can be claimed"),
        (
            compared(Difference(-0.31, -0.37, -0.25, 0.0, 40), before={"cer": HIGH}, metric="cer"),
            "worse",
            "Worse: −0.310 [−0.370, −0.250] (lower is better).",
            "can be claimed",
        ),
        (compared(SAME), "none", "No difference can be claimed: 0.000 [−0.100, 0.100].", "Only"),
        (compared(replace(BETTER, changed=5)), "none", "Only 5 rows scored diff", "Better"),
        (compared(replace(BETTER, changed=1)), "none", "Only 1 row scored", "Better"),
        (compared(replace(SAME, changed=0)), "none", "No row scored diff", "Better"),
        (compared(None), "untested", "was not tested, so no improvement can be", "Better"),
        (compared(None, before=None), "untested", "not evaluated before training, so no", "Better"),
        (compared(None, after=None), "untested", "not evaluated after training, so no", "Better"),
        (ReportContent(title="run"), "untested", "The model was not evaluated", "Measured"),
    ],
)
def test_the_headline_claims_no_more_than_was_measured(content, verdict, said, not_said):
    assert content.verdict == verdict
    assert said in headline(content)
    assert not_said not in headline(content)
    page = Page(report_html(content))
    assert headline(content) in page.text
    assert len(page.of("div", **{"class": f"verdict {verdict}"})) == 1
    if content.metrics:
        assert "Measured on 64 rows; brackets are 95 % intervals." in headline(content)


def test_a_report_of_nothing_is_still_a_report():
    page = Page(report_html(ReportContent(title="empty")))
    assert (page.strangers, page.open, page.of("section"), page.of("a")) == ([], [], [], [])
    assert "nothing can be said about its quality" in page.text


def test_every_sum_of_the_ledger_is_printed():
    ledger = {"in": 1_250, "trained": 1_000, "dropped": {"too_long": 40, "other": 10}}
    ledger |= {"validation": 150, "quarantined": {"image_truncated": 50}}
    page = Page(report_html(ReportContent(title="run", ledger=ledger)))
    sums = "1,250 = 1,000 + 40 + 10 + 150 + 50. Every row that came in is accounted for."
    assert ledger_words(ledger) == (True, sums)
    assert sums in page.text
    assert page.inside("td") == [
        *("trained", "1,000", "dropped: too_long", "40", "dropped: other", "10"),
        *("validation", "150", "quarantined: image_truncated", "50", "rows in", "1,250"),
    ]
    assert page.of("p", **{"class": "holds"})


@pytest.mark.parametrize(("came", "words"), [(11, "1 are missing"), (8, "2 are too many")])
def test_a_ledger_that_does_not_add_up_is_said_so(came, words):
    content = ReportContent(title="run", ledger={"in": came, "trained": 7, "validation": 3})
    page = Page(report_html(content))
    assert f"{came} rows came in, 7 + 3 = 10 are accounted for. {words}" in page.text
    assert page.of("p", **{"class": "fails"})
    assert not page.of("p", **{"class": "holds"})


# Rows


def marked(answer: str, *truth: str) -> str:
    """``faults`` with signs for its marks."""
    text = re.sub(r"<del[^>]*>(.*?)</del>", r"-\1-", faults(answer, truth))
    return re.sub(r"<ins[^>]*>(.*?)</ins>", r"+\1+", text)


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        ("x + y", "x + y", "x + y"),
        ("abcdef", "abXdef", "ab-c-+X+def"),
        ("abcdef", "abdef", "ab-c-def"),
        ("abcdef", "abcXdef", "abc+X+def"),
        ("abc", "abcabc", "abc+abc+"),
        ("one two", "two", "-one -two"),
        ("abc", "xyz", "-abc-+xyz+"),
        ("axbxc", "1x2x3", "-axbxc-+1x2x3+"),  # single characters in common are chance
        ("中文答案", "中文回答", "中文-答案-+回答+"),
    ],
)
def test_exactly_what_differs_is_marked(truth, answer, expected):
    assert marked(answer, truth) == expected


def test_an_answer_is_compared_with_the_closest_truth():
    assert marked("red panda", "dog", "red pandas") == "red panda-s-"
    assert marked("red panda") == "red panda"
    assert '<em class="muted">empty </em>' in faults("", ["dog"])
    assert marked("", "dog").endswith("-dog-")


def test_marks_spell_both_texts():
    draw = random.Random(2)
    for _ in range(300):
        one, other = ("".join(draw.choices("ab {}", k=draw.randint(0, 30))) for _ in range(2))
        runs = differences(one, other)
        assert "".join(missing + same for missing, _, same in runs) == one
        assert "".join(extra + same for _, extra, same in runs) == other


def test_what_is_too_long_to_compare_is_said():
    truth = "abcdefghij" * 200
    assert "compared" not in faults(truth[:LONGEST], [truth[:LONGEST]])
    for answer in (truth[:LONGEST], truth + "x"):
        words = f"the answer has {len(answer):,}, the truth 2,000"
        assert words in faults(answer, [truth])


def test_a_model_that_repeats_itself_does_not_hold_up_the_report():
    began = time.perf_counter()
    for answer, truth in (("{ " * 600, "{ a }" * 240), ("a" * LONGEST, "a b " * 300)):
        faults(answer, [truth])
    assert time.perf_counter() - began < 0.5  # difflib: 8 s


def test_rows_are_ranked_by_the_metric_s_direction():
    rows = [
        ReportRow(id=f"{score}", question="", truth=("a",), after="b", score_after=score)
        for score in (0.5, 0.1, 0.9, 0.3, 0.7)
    ]
    for metric, first in (("edit_similarity", "0.1"), ("cer", "0.9")):
        worst, best = ranked(ReportContent(title="", rows=rows, after={metric: HIGH}), 2)
        assert worst[0].id == first
        assert len({row.id for row in worst + best}) == 4


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_thumbnails_are_upright_and_bounded_and_tell_nothing_else():
    sideways = Image.new("RGB", (1500, 300), "red")
    sideways.paste("blue", (0, 0, 750, 300))  # left half
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "private"
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        extra = {"comment": b"private"} if kind == "JPEG" else {}
        sideways.save(file, kind, exif=exif, icc_profile=b"private" * 40, **extra)
        shown = decoded(thumbnail(file.getvalue()))
        assert shown.size == (192, 960)
        assert shown.convert("RGB").getpixel((96, 10)) >= (0, 0, 200)  # left became top
        assert shown.convert("RGB").getpixel((96, 950))[0] > 200
        assert not shown.info.keys() & {"exif", "icc_profile", "comment"}
    noise = thumbnail(picture((900, 400)).data)
    assert noise.startswith("data:image/jpeg")
    assert decoded(noise).width == 640
    small = picture((31, 17), colour="red")
    assert decoded(thumbnail(small.data)).size == (31, 17)
    with pytest.raises(ImageError):
        thumbnail(b"no picture")


def test_a_picture_that_cannot_be_opened_is_said_so():
    row = ReportRow(id="1", question="q", truth=("a",), after="a", score_after=1.0, image=b"broken")
    page = Page(report_html(ReportContent(title="", rows=[row], after={"cer": LOW})))
    assert "The picture cannot be shown (image_" in page.text
    assert not page.of("img")


def test_at_most_forty_rows_are_shown_and_none_twice():
    rows = [
        ReportRow(id=f"row {n}", question="", truth=("a",), after="a", score_after=n / 100)
        for n in range(100)
    ]
    page = Page(report_html(ReportContent(title="", rows=rows, after={"exact_match": LOW})))
    shown = page.inside("h4")
    assert len(shown) == len(set(shown)) == 2 * 20
    assert shown[:2] == ["row 0", "row 1"]
    assert shown[20:22] == ["row 99", "row 98"]


# Curves


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
    (rate,) = Page(curve("rate", "", {"": noisy}, smoothed=False)).of("polyline")
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
    labels = Page(curve("loss", "", {"": points})).inside("text")
    assert all(len(label) <= 9 for label in labels)
    assert points_of([{"step": 1, "loss": "text"}], "loss") == []


# Style


def test_the_style_knows_phone_paper_and_darkness():
    for media in ("max-width: 720px", "prefers-color-scheme: dark"):
        assert f"@media ({media})" in STYLE
    assert "@media print" in STYLE
    assert re.search(r"\.tiles dd \{[^}]*white-space: nowrap", STYLE)
    (viewport,) = HARMLESS.of("meta", name="viewport")
    assert viewport["content"] == "width=device-width, initial-scale=1"
    assert STYLE.count("{") == STYLE.count("}")
    used = {name for _, found in HARMLESS.elements for name in (found.get("class") or "").split()}
    assert {"tiles", "verdict", "columns", "curve", "whiskers"} <= used


def test_names_of_the_phone_s_cells_are_the_columns():
    content = compared(BETTER)
    labels = [cell["data-label"] for cell in Page(report_html(content)).of("td") if cell]
    assert labels == ["Before", "After", "Difference"]


def test_html_is_only_what_tag_made():
    assert markup.group(["<b>", Html("<i>")]) == "&lt;b&gt;<i>"
    assert markup.tag("p", Html("<i></i>") + "<b>") == "<p>&lt;i&gt;&lt;/i&gt;&lt;b&gt;</p>"
    assert markup.tag("p", title='"\u202e', data_label=None) == '<p title="&quot;\\u202e"></p>'
