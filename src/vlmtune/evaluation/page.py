"""The frame of every page that vlmtune writes: one file that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlmtune.evaluation.markup import Html, group, tag, visible

Section = tuple[str, str, Html]  # anchor, title, content

# No script, nothing from elsewhere: only the page's own style and the pictures written into it.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


def document(
    *,
    kind: str,
    title: str,
    heading: Html,
    top: Sequence[str],
    sections: Iterable[Section],
    style: str,
) -> str:
    """A whole page; the same content gives the same bytes.

    Args:
        kind: What wrote it, as ``vlmtune check``.
        title: Of the window.
        heading: The page's ``h1``.
        top: What stands beneath it.
        sections: Anchor, title and content; those without content are left out.
        style: CSS.
    """
    kept = [section for section in sections if section[2]]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", visible(f"{title} – {kind}")),  # a title shows no elements
        tag("style", Html(style)),
    )
    links = [tag("a", name, href=f"#{anchor}") for anchor, name, _ in kept]
    parts = [tag("p", kind, class_="brand"), heading, *top, tag("nav", *links)]
    body = [
        group(["\n", tag("section", tag("h2", name), content, id=anchor)])
        for anchor, name, content in kept
    ]
    footer = tag("footer", "Written by vlmtune. This file loads nothing and runs nothing.")
    whole = tag("body", tag("div", *parts, class_="top"), tag("main", *body, footer))
    return f"<!doctype html>\n{tag('html', head, chr(10), whole, lang='en')}\n"
