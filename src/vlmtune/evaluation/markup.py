r"""HTML that is safe by construction: text is escaped unless it was made by ``tag``.

Control characters and characters that reorder or hide text are shown as ``\u202e`` instead of
taking effect: a report quotes data that nobody has looked at yet.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable

VOID = frozenset({"br", "hr", "img", "meta"})
# Joiners are needed to write Persian, Hindi and emoji; they reorder nothing.
_JOINERS = "\u200c\u200d"
_SUSPECT = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


class Html(str):
    """Text that is HTML already. Adding a plain string gives a plain string, escaped later."""

    __slots__ = ()


def _is_hidden(character: str) -> bool:
    if character in "\n\t" or character in _JOINERS:
        return False
    return unicodedata.category(character) in _SUSPECT


def _name(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def visible(text: str) -> str:
    r"""The text with control, bidirectional and invisible characters spelled out as ``\uXXXX``."""
    return "".join(_name(c) if _is_hidden(c) else c for c in text)


def escape(text: str) -> Html:
    """Text as HTML; what ``visible`` spells out is set apart."""
    escaped = html.escape(text)
    if escaped.isascii() and escaped.isprintable():
        return Html(escaped)
    return Html(
        "".join(
            f'<span class="hidden-character">{_name(c)}</span>' if _is_hidden(c) else c
            for c in escaped
        )
    )


def group(parts: Iterable[str]) -> Html:
    """The parts one after the other, each escaped unless it is ``Html``."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def tag(element: str, /, *children: str, **attributes: str | None) -> Html:
    """An element; ``class_`` is ``class``, ``stroke_width`` ``stroke-width``, None left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(visible(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if element in VOID:
        return Html(f"<{element}{written}>")
    return Html(f"<{element}{written}>{group(children)}</{element}>")
