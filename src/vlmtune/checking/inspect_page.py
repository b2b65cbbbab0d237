"""``inspect`` as one HTML file: pictures, tokens by colour, the loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image as Pictures

from vlmtune.checking.inspect import SeenImage, SeenRow, Stretch
from vlmtune.checking.page import page
from vlmtune.evaluation.markup import Html, group, tag
from vlmtune.evaluation.overlay import data_uri, drawing

SHOWN_WIDE = 560  # a small picture is shown larger, up to this width
KINDS = {
    "template": "the chat template",
    "question": "system and user text",
    "answer": "answer",
    "control": "control token",
    "image": "image tokens",
}
STYLE = """
.tokens { font: 13.5px/2.05 ui-monospace, SFMono-Regular, Menlo, Consolas, "Noto Sans Mono CJK SC",
  monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens span { padding: 2px 0; border-radius: 3px; box-shadow: inset -1px 0 0 var(--card); }
.template { background: var(--soft); color: var(--muted); }
.question { background: color-mix(in srgb, var(--text-bar) 16%, transparent); margin: 0;
  font-size: inherit; color: inherit; }
.tokens .answer, .legend .answer { display: inline; font-size: inherit;
  background: color-mix(in srgb, #2e9d4f 22%, transparent); }
.control { background: color-mix(in srgb, #8e5bd0 20%, transparent); }
.image { background: color-mix(in srgb, var(--image-bar) 24%, transparent); }
.tokens .trained, .legend .trained { border-bottom: 2.5px solid #2e9d4f; }
.legend { display: flex; flex-wrap: wrap; gap: 8px 16px; font-size: 13px; margin: 0 0 14px; }
.legend span { padding: 1px 8px; border-radius: 3px; }
.seen { display: flex; flex-wrap: wrap; gap: 16px; margin: 6px 0 14px; }
.seen figure { margin: 0; max-width: 100%; }
.seen figcaption { display: block; font-size: 12.5px; color: var(--muted); margin-top: 4px; }
.seen svg { max-width: 100%; height: auto; border: 1px solid var(--rule); }
.seen svg .label { font: 600 13px system-ui, "Noto Sans CJK SC", sans-serif; fill: #fff; }
"""


def write_inspect_page(file: Path, rows: Sequence[SeenRow], data: str, model: str) -> None:
    """Write the page."""
    file.write_text(inspect_html(rows, data, model), encoding="utf-8")


def inspect_html(rows: Sequence[SeenRow], data: str, model: str) -> str:
    """The page's text; the same rows give the same bytes."""
    tokens = sum(len(row.input_ids) for row in rows)
    trained = sum(label != -100 for row in rows for label in row.labels)
    visual = sum(image.tokens for row in rows for image in row.images)
    return page(
        kind="vlmtune inspect",
        title=data,
        subtitle=f"as {model} sees it",
        verdict=Html(""),
        tiles=[
            ("rows shown", f"{len(rows):,}"),
            ("tokens", f"{tokens:,}"),
            ("of images", f"{visual:,}"),
            ("trained on", f"{trained:,}"),
        ],
        sections=[("rows", "Rows", group([_legend(), *(_row(row) for row in rows)]))],
        style=STYLE,
    )


def _legend() -> Html:
    kinds = [tag("span", words, class_=kind) for kind, words in KINDS.items()]
    return tag("p", *kinds, tag("span", "the loss counts it", class_="trained"), class_="legend")


def _row(row: SeenRow) -> Html:
    trained = sum(label != -100 for label in row.labels)
    figures = f"{row.place} · {len(row.input_ids):,} tokens, {trained:,} trained"
    header = tag(
        "header", tag("h4", row.id, dir="auto"), tag("span", figures, class_="where", dir="auto")
    )
    pictures = [_picture(image, f"picture of {row.id}") for image in row.images]
    seen = tag("div", *pictures, class_="seen") if pictures else ""
    spans = [_span(stretch) for stretch in row.stretches]
    return tag("article", header, seen, tag("div", *spans, class_="tokens"), class_="row")


def _picture(image: SeenImage, alt: str) -> Html:
    picture = Pictures.fromarray(image.picture)
    scale = max(1.0, min(3.0, SHOWN_WIDE / picture.width))
    caption = (
        f"{image.size.width} × {image.size.height} → {image.resized.width} × "
        f"{image.resized.height} pixels, {image.tokens:,} tokens"
    )
    drawn = drawing(data_uri(picture, exact=True), image.resized, image.marks, scale=scale, alt=alt)
    return tag("figure", drawn, tag("figcaption", caption))


def _span(stretch: Stretch) -> Html:
    text = stretch.text if stretch.kind != "image" else f" {stretch.tokens:,} image tokens "
    shown = text.replace("\n", "⏎\n")
    names = f"{stretch.kind} trained" if stretch.trained else stretch.kind
    return tag("span", shown, class_=names)
