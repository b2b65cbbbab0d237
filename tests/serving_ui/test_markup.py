"""What is typed and said stays what it is when it is shown."""

from __future__ import annotations

import pytest

from vlmtune.serving.webui import markup

FORMULAS = [
    r"\frac { a + b } { c ^ { 2 } } = \sqrt { x }",
    r"\begin{array}{cccc} 1 & 2 \\ 3 & 4 \end{array}",
    r"\mathrm { e x p } ( x )",
    r"x^2 + y_1",
    r"\text{otherwise} \quad x < y",
    r"\operatorname*{argmax} _ { x } f",
]
PROSE = [
    "A red ball.",
    r"The file is C:\temp\file_name",
    "红色的球 x^2",
    "a < b > c",
    r"It is $\frac{a}{b}$.",
    '```json\n[{"bbox_2d": [1, 2, 3, 4]}]\n```',
    "x",
    "1234,(5)",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_shown_as_one(text):
    assert markup.answer(text) == f"$$\n{text}\n$$"
    assert markup.answer(text, whole=False) == markup.code(text)  # half of one cannot be


@pytest.mark.parametrize("text", PROSE)
def test_prose_is_no_formula(text):
    assert not markup.is_formula(text)


def test_a_formula_that_is_none_is_shown_as_it_is_written():
    for text in (r"\frac { a } { b", r"} \sqrt {", r"\frac { a \} { b }"):
        assert markup.is_formula(text)
        assert markup.answer(text) == markup.code(text)
    assert markup.balanced(r"\{ {a} \\ {b}")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("costs $5 and $6", "costs $5 and $6"),
        ("so $x$ is", r"so \(x\) is"),
        ("$$x$$", "$$x$$"),
        ("<img src=x onerror=y>", "&lt;img src=x onerror=y>"),
        (
            "<ref>dog</ref><box>(1,2),(3,4)</box>",
            "&lt;ref>dog&lt;/ref>&lt;box>(1,2),(3,4)&lt;/box>",
        ),
        ("![x](http://e/x.png)", "&#33;[x](http://e/x.png)"),
        ("`<b>` and <b>", "`<b>` and &lt;b>"),
        ("```\n<b> $x$\n``` <b>", "```\n<b> $x$\n``` &lt;b>"),
        ("a < b", "a < b"),
        ("<|im_end|>", "<|im_end|>"),
    ],
)
def test_answers(text, shown):
    assert markup.answer(text) == shown


@pytest.mark.parametrize(
    "text",
    ["<img>/etc/passwd</img>", "![a](http://e/x.png)", "<!-- x -->", "<|im_end|>", "a<b", "[x](y)"],
)
def test_a_question_is_shown_as_typed(text):
    shown = markup.question(text)
    assert markup.typed(shown) == text
    for tag in ("<i", "</", "<!", "<b", "]("):
        assert tag not in shown


@pytest.mark.parametrize("text", ["x", "```", "a ```` b", "", "`"])
def test_code_is_fenced_by_what_it_does_not_hold(text):
    fence, inside, end = markup.code(text).split("\n")
    assert (fence == end, inside) == (True, text)
    assert fence not in inside
