"""Reports and the comparison of runs as a browser shows them."""

from __future__ import annotations

import html
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from devtools import Tab
from report_samples import HIGH, LOW, PAYLOADS, filled, spelled
from tiny_rows import picture
from vlmtune.data.conversation import Box
from vlmtune.evaluation.comparison import RunLine
from vlmtune.evaluation.comparison_page import comparison_html
from vlmtune.evaluation.page import POLICY
from vlmtune.evaluation.report import report_html
from vlmtune.evaluation.report_content import ReportContent, ReportRow

pytestmark = pytest.mark.browser

DESKTOP, PHONE = 1280, 390
HOSTILE = (
    "<script>document.title = 'taken'; fetch('https://evil.example')</script>"
    "<img src=x onerror=\"document.title='taken'\"> \u202eevil\u2066 \x1b[31mred\x1b[0m \x00"
)
FINE = "a fine answer"


def content(text: str) -> ReportContent:
    """A report with a text in every field, and what the page is widest with."""
    names = [f"class {number} of a long name" for number in range(12)]
    cells = [[number, number, 9] for number in range(12)] + [[0, 1, 3], [2, 12, 1]]
    sample = filled(text)
    answers = replace(sample.answers["after"], confusion={"classes": names, "cells": cells})
    return replace(sample, recipe_yaml=f"{text}\n" + "x" * 300, answers={"after": answers})


def compared(text: str) -> str:
    steps = [{"step": n, "loss": 3 / n, "learning_rate": 1e-4} for n in range(1, 60)]
    lines = [
        RunLine(
            name=f"run {number} {text}",
            path=f"runs/{number}",
            kind=kind,
            state=f"{kind}: {text}",
            step=59,
            base=f"base {text}",
            data=f"data {text}",
            fingerprint="f",
            metric="edit_similarity",
            before={"edit_similarity": LOW},
            after={"edit_similarity": HIGH},
            options={"model.base": f"option {number} {text}", "training.seed": 1},
            steps=steps,
        )
        for number, kind in enumerate(("finished", "running", "stopped", "damaged"))
    ]
    return comparison_html(f"title {text}", lines)


PAGES = {"report": lambda text: report_html(content(text)), "runs": compared}


def opened(browser, source: str, folder: Path, **window) -> Tab:
    browser.close_tabs()
    file = folder / "page.html"
    file.write_text(source, encoding="utf-8")
    return Tab.open(browser, file, **window)


def wide(tab: Tab) -> list[str]:
    """Elements that reach beyond the window, but for those that may be scrolled by themselves."""
    return tab.evaluate(
        "[...document.body.querySelectorAll('*')].filter(each => !each.closest('.wide, .formula, "
        "svg') && each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML"
        ".slice(0, 80))"
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("page", PAGES)
def test_it_loads_nothing_runs_nothing_and_fits(browser, tmp_path, page, width, dark):
    tab = opened(browser, PAGES[page](HOSTILE), tmp_path, width=width, dark=dark)
    assert tab.complaints() == []
    (only,) = [url for url in tab.requests() if not url.startswith("data:")]
    assert only.endswith("page.html")
    assert tab.evaluate("document.title") != "taken"
    assert tab.evaluate("document.scripts.length") == 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert wide(tab) == []
    shot = Image.open(io.BytesIO(tab.screenshot(tmp_path / "page.png"))).convert("L")
    light = np.asarray(shot).mean() > 128
    assert light != dark


@pytest.mark.parametrize("page", PAGES)
def test_what_an_answer_holds_is_shown_as_text(browser, tmp_path, page):
    for text in (HOSTILE, *PAYLOADS):
        tab = opened(browser, PAGES[page](text), tmp_path, width=DESKTOP)
        shown = tab.evaluate("document.body.textContent")
        field = "after" if page == "report" else "option 0"
        assert " ".join(spelled(f"{field} {text}"[:40]).split()) in " ".join(shown.split()), text
        assert tab.complaints() == []
        assert len([url for url in tab.requests() if not url.startswith("data:")]) == 1


def test_a_page_that_did_run_or_load_something_would_be_seen(browser, tmp_path):
    """Negative control."""
    source = report_html(content(FINE)).replace(html.escape(POLICY), "img-src data:")
    script = "<script>document.title='taken';console.log(1);fetch('http://127.0.0.1:1/')</script>"
    tab = opened(browser, source.replace("</main>", f"{script}</main>"), tmp_path, width=DESKTOP)
    assert tab.evaluate("document.title") == "taken"
    assert tab.complaints()
    assert any(url.startswith("http://127.0.0.1") for url in tab.requests())
    # The same script in a page of ours: the policy stops it, and the browser says so.
    source = report_html(content(FINE)).replace("</main>", f"{script}</main>")
    tab = opened(browser, source, tmp_path, width=DESKTOP)
    assert tab.evaluate("document.title") != "taken"
    assert "Content Security Policy" in " ".join(tab.complaints())
    broad = source.replace("</main>", "<p style='width: 3000px'>x</p></main>")
    assert wide(opened(browser, broad, tmp_path, width=PHONE))


def near(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a picture has a colour, (height, width)."""
    return np.abs(pixels.astype(int) - colour).sum(axis=2) < 40


def test_boxes_lie_where_they_belong(browser, tmp_path):
    """A black rectangle on white, and the truth around it: green lies on its edge, orange aside."""
    from PIL import ImageDraw

    original = Image.new("RGB", (1280, 640), "white")
    ImageDraw.Draw(original).rectangle((200, 160, 600, 480), fill="black")
    file = io.BytesIO()
    original.save(file, "PNG")
    row = ReportRow(
        id="1",
        question="",
        truth=("x",),
        after="y",
        score_after=0.0,
        true_boxes=[Box(0, "", (200, 160, 600, 480))],
        boxes_after=[Box(0, "", (700, 160, 1100, 480))],
        images=[file.getvalue()],
        pictures=1,
    )
    source = report_html(ReportContent(title="t", after={"cer": LOW}, rows=[row]))
    tab = opened(browser, source, tmp_path, width=DESKTOP)
    shot = np.asarray(Image.open(io.BytesIO(tab.screenshot(tmp_path / "page.png"))).convert("RGB"))
    place = tab.evaluate(
        "(r => [r.left, r.top, r.width])(document.querySelector('.picture svg')"
        ".getBoundingClientRect())"
    )
    left, top, width = place[0], place[1], place[2]
    scale = width / 1280
    drawn = shot[int(top) : int(top + 640 * scale), int(left) : int(left + width)]
    green, orange, black = (
        np.argwhere(near(drawn, c)) for c in ((27, 127, 59), (194, 65, 12), (0, 0, 0))
    )
    for edge in (green.min(axis=0) - black.min(axis=0), green.max(axis=0) - black.max(axis=0)):
        assert np.abs(edge).max() <= 5  # half the line, and the white around it
    assert abs(orange[:, 1].min() - 700 * scale) <= 3
    assert abs(orange[:, 1].max() - 1100 * scale) <= 3


def test_it_prints(browser, tmp_path):
    tab = opened(browser, report_html(content(FINE)), tmp_path, width=DESKTOP, dark=True)
    printed = tab.print_pdf()
    assert printed.startswith(b"%PDF")
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_links_lead_to_their_sections(browser, tmp_path):
    tab = opened(browser, report_html(content(FINE)), tmp_path, width=PHONE)
    links = tab.evaluate("[...document.querySelectorAll('nav a')].map(a => a.hash)")
    assert {"#results", "#slices", "#classes", "#training", "#rows", "#data"} <= set(links)
    for link in links:
        assert tab.evaluate(f"!!document.querySelector({json.dumps(link)})")


def test_many_rows_stay_a_small_file(browser, tmp_path):
    rows = [
        ReportRow(
            id=str(number),
            question="",
            truth=("x",),
            after="y" * 5000,
            score_after=number / 100,
            images=[picture((700, 700), seed=number % 3).data] * 2,
            pictures=9,
        )
        for number in range(30)
    ]
    source = report_html(ReportContent(title="t", after={"exact_match": LOW}, rows=rows))
    assert len(source) < 18 * 2**20
    tab = opened(browser, source, tmp_path, width=PHONE)
    assert tab.evaluate("document.querySelectorAll('article').length") == 30
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)")
    assert "and 7 more pictures" in tab.evaluate("document.body.innerText")
