import re
from dataclasses import replace

import pytest

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
from vlmtune.evaluation import markup
from vlmtune.evaluation.intervals import Difference
from vlmtune.evaluation.markup import Html
from vlmtune.evaluation.report import report_html, write_report
from vlmtune.evaluation.report_content import ReportContent, ReportRow, headline, ledger_words
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
    source = report_html(filled(payload))
    try:
        page = Page(source)
    except AssertionError:  # of Python's parser: not even HTML any more
        return
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
        (
            compared(None, before=None, recipe_yaml="a: 1"),
            "untested",
            "not evaluated before training, so no",
            "Better",
        ),
        (compared(None, before=None), "untested", "Edit similarity is 0.721 [", "training"),
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
