"""The frame of ``check``'s and ``inspect``'s pages: one file that loads and runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlmtune.evaluation.markup import Html, tag
from vlmtune.evaluation.page import Section, document
from vlmtune.evaluation.report_style import STYLE

Tile = tuple[str, str]

OWN_STYLE = """
:root { --stop: #b3261e; --stop-soft: #fdeceb; --note: #7a5b00; --note-soft: #fbf1cf;
  --text-bar: #0f6fde; --image-bar: #2aa198; }
@media (prefers-color-scheme: dark) {
  :root { --stop: #ff9b93; --stop-soft: #43201e; --note: #e8cc6a; --note-soft: #38310f;
    --text-bar: #5aa9ff; --image-bar: #4fc4ba; }
}
h1 small { display: block; font-size: 14px; font-weight: 400; color: var(--muted);
  letter-spacing: 0; margin-top: 4px; }
.badge.stop, .word.stop { background: var(--stop-soft); color: var(--stop); }
.badge.note, .word.note { background: var(--note-soft); color: var(--note); }
.badge.accepted { background: var(--soft); color: var(--muted); }
.verdict.stop { border-left-color: var(--stop); }
.verdict.note { border-left-color: var(--note); }
.mono, code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: 13px; }
.grid { display: grid; gap: 14px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.grid > .wide { grid-column: 1 / -1; }
article.row header { flex-wrap: wrap; gap: 2px 12px; }
article.row header .where { color: var(--muted); font-size: 12.5px; overflow-wrap: anywhere; }
.grid article.row { margin: 0; }
.picture svg { max-width: 100%; height: auto; display: inline-block; vertical-align: middle; }
.picture svg .label { font: 600 13px system-ui, "Noto Sans CJK SC", sans-serif; fill: #fff; }
.cells { fill: none; stroke: #000; stroke-opacity: .16; stroke-width: 1; }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 10px; }
.pair figure { margin: 0; }
.pair figcaption { display: block; color: var(--muted); font-size: 12.5px; margin: 0 0 4px;
  overflow-wrap: anywhere; }
.found { font-size: 13.5px; margin: 0 0 8px; overflow-wrap: anywhere; }
.answer { background: var(--soft); border-radius: 8px; padding: 6px 10px; font-size: 13px;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
section h2 .badge { vertical-align: 3px; margin-left: 8px; }
section h2 code { font-size: 18px; }
"""


def page(
    *,
    kind: str,
    title: str,
    subtitle: str,
    verdict: Html,
    tiles: Sequence[Tile],
    sections: Iterable[Section],
    style: str = "",
) -> str:
    """A whole page; the same content gives the same bytes.

    Args:
        kind: What wrote it, as ``vlmtune check``.
        title: The heading.
        subtitle: A smaller line beneath.
        verdict: The box at the top, or nothing.
        tiles: Figures beneath, name and value.
        sections: Anchor, title and content; those without content are left out.
        style: Style of this kind of page.
    """
    figures = [tag("div", tag("dt", name), tag("dd", value)) for name, value in tiles]
    return document(
        kind=kind,
        title=title,
        heading=tag("h1", title, tag("small", subtitle) if subtitle else "", dir="auto"),
        top=[verdict, tag("dl", *figures, class_="tiles") if figures else ""],
        sections=sections,
        style=STYLE + OWN_STYLE + style,
    )


def verdict_box(standing: str, word: str, sentence: str) -> Html:
    """The box at the top: a coloured word and a sentence."""
    return tag(
        "div",
        tag("span", word, class_=f"word {standing}"),
        tag("p", sentence, class_="sentence"),
        class_=f"verdict {standing}",
    )
