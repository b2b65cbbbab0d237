"""Qwen-VL's text form: images and boxes as tags inside a text.

``Picture 1: <img>PATH</img>`` and a line break place an image; ``<ref>PHRASE</ref>`` directly
before ``<box>(x1,y1),(x2,y2)</box>`` names it, and several boxes may follow one phrase. A box lies
on the latest image, in integers 0 … 999 of its width and height. ``<quad>`` and a phrase without a
box stay text. ``parse`` takes linear time, whatever the text; ``render`` is its inverse.

The tags and their rules are those of the tokenizer in QwenLM/Qwen-VL (``tokenization_qwen.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vlmtune.data.boxes import Corners
from vlmtune.data.conversation import Box, Image, Part, Text
from vlmtune.data.formats.draft import tidy
from vlmtune.data.sources import FieldError

GRID = 1000

_TAG = re.compile(r"(</?(?:img|ref|box|quad)>)")
_PICTURE = re.compile(r"Picture (\d{1,9}): ?\Z")
_NUMBER = r"\s{0,9}(-?\d{1,9}(?:\.\d{1,9})?)\s{0,9}"
_CORNERS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s{{0,9}},\s{{0,9}}\({_NUMBER},{_NUMBER}\)")


def parse(text: str, images: list[str], field: str = "") -> tuple[tuple[Part, ...], list[str]]:
    """The parts of a text, with boxes in steps of the grid; and notes.

    Args:
        text: A turn's value.
        images: Paths or URLs of the images of the turns before; this turn's are appended.
        field: Where the text stands, for messages.

    Raises:
        FieldError: ``bad_markup``: a tag is not closed, or inside another; ``bad_box``.
    """
    parts: list[Part] = []
    notes: list[str] = []
    first = len(images)  # a turn may number its pictures from 1 on again
    label: str | None = None  # a phrase waits for its boxes
    phrase = False  # … and was written as text
    for tag, content in _elements(text, field):
        if tag == "box":
            if phrase:
                parts.pop()
            corners = _corners(content, images, field)
            parts.append(Box(len(images) - 1, label or "", corners))
            phrase = False
            continue
        label, phrase = None, False
        if tag == "img":
            number = _drop_picture(parts)
            images.append(content)
            if number not in (None, len(images), len(images) - first):
                notes.append(f"{field} calls image {len(images)} 'Picture {number}'")
            parts.append(Image(len(images) - 1))
        elif tag == "ref":
            label, phrase = content, True
            parts.append(Text(f"<ref>{content}</ref>"))
        elif tag == "quad":
            notes.append(f"{field} has a <quad>, which is kept as text")
            parts.append(Text(f"<quad>{content}</quad>"))
        elif parts and isinstance(parts[-1], Image):
            parts.append(Text(content.removeprefix("\n")))
        else:
            parts.append(Text(content))
    tidied = tidy(parts)
    if any(isinstance(part, Text) and "<ref>" in part.text for part in tidied):
        notes.append(f"{field} has a <ref> without a <box>, which is kept as text")
    return tidied, notes


def _elements(text: str, field: str) -> Iterator[tuple[str, str]]:
    """(tag, content) and ("", text) in their order."""
    # re.split with one group: text, tag, text, tag, …, text
    pieces = _TAG.split(text)
    position = 0
    while position < len(pieces):
        if pieces[position]:
            yield "", pieces[position]
        if position + 1 == len(pieces):
            return
        tag = pieces[position + 1].strip("<>")
        closing = pieces[position + 3] if position + 3 < len(pieces) else "the end"
        if tag.startswith("/") or closing != f"</{tag}>":
            raise FieldError(
                "bad_markup",
                f"{field}: <{tag}> is not closed by its own </{tag}>; found {closing} next"
                if not tag.startswith("/")
                else f"{field}: <{tag}> closes nothing",
                field=field,
                value=text,
            )
        yield tag, pieces[position + 2]
        position += 4


def _drop_picture(parts: list[Part]) -> int | None:
    """Take ``Picture N: `` off the text before an image; the number, if there was one."""
    if not parts or not isinstance(parts[-1], Text):
        return None
    text = parts[-1].text
    found = _PICTURE.search(text)
    if found is None:
        return None
    parts[-1] = Text(text[: found.start()])
    return int(found[1])


def _corners(content: str, images: Sequence[str], field: str) -> Corners:
    found = _CORNERS.fullmatch(content)
    if found is None or not images:
        expected = "(x1,y1),(x2,y2)" if images else "an image before the box"
        raise FieldError(
            "bad_box",
            f"{field}: <box>{content[:80]}</box>: expected {expected}",
            field=field,
            value=content,
        )
    x1, y1, x2, y2 = map(float, found.groups())
    return x1, y1, x2, y2


def render(parts: Sequence[Part], images: Sequence[str]) -> str:
    """The text that ``parse`` makes ``parts`` of.

    Args:
        parts: A turn's, with boxes in steps of the grid (see ``data.boxes.to_grid``).
        images: Paths or URLs of all images of the conversation.

    Raises:
        FieldError: ``bad_markup``: this form cannot say it, e.g. a tag stands in a text, or a box
            lies on another than the latest image.
    """
    written: list[str] = []
    carried: str | None = ""  # what an unnamed box would be called here; None: it must be named
    for part in parts:
        match part:
            case Image(index):
                written.append(f"Picture {index + 1}: <img>{images[index]}</img>\n")
                carried = ""
            case Text(text):
                written.append(text)
                carried = None if text.endswith("</ref>") else ""
            case Box(_, name, corners):
                if name != carried:
                    written.append(f"<ref>{name}</ref>")
                x1, y1, x2, y2 = (f"{value:.9g}" for value in corners)
                written.append(f"<box>({x1},{y1}),({x2},{y2})</box>")
                carried = name
    text = "".join(written)
    if parse(text, _images_before(parts, images), "the turn")[0] != tuple(parts):
        raise FieldError(
            "bad_markup",
            "Qwen-VL's text form cannot say this turn: a text that looks like a tag, or a box on "
            f"another than the latest image; found {text[:200]!r}",
            value=text,
        )
    return text


def _images_before(parts: Sequence[Part], images: Sequence[str]) -> list[str]:
    """The images of the turns before, as far as ``parts`` tell."""
    for part in parts:
        if isinstance(part, Image):
            return list(images[: part.index])
        if isinstance(part, Box):
            return list(images[: part.image + 1])
    return []
