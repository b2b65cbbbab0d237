"""Qwen-VL's tags inside a text: ``<img>``, ``<ref>``, ``<box>``, ``<quad>``.

A list of elements is the form in which the original's users write a question: ``{"image": PATH}``,
``{"text": …}``, ``{"ref": PHRASE, "box": [[x1, y1, x2, y2], …]}`` with integers 0 … 999. Nothing
here opens a path: ``vlmtune.data.formats`` turns the text form into conversations with images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

from vlmtune.errors import RowError
from vlmtune.models.qwen_vl.controls import CONTROLS, END_OF_TEXT, IMAGE_TAGS

Tag = Literal["", "img", "ref", "box", "quad"]
TAG = re.compile(r"<(/?)(img|ref|box|quad)>")


def elements(text: str) -> Iterator[tuple[Tag, str]]:
    """What a text consists of, in order: (tag, content), and ("", text) between the tags.

    A tag without its partner is text. Takes linear time, whatever the text.
    """
    tags = list(TAG.finditer(text))
    partner = _partners(tags)
    plain, place = 0, 0  # what is yet to be yielded as text begins at ``plain``
    while place < len(tags):
        closing = partner[place]
        if closing is None:
            place += 1
            continue
        opening = tags[place]
        if opening.start() > plain:
            yield "", text[plain : opening.start()]
        yield cast("Tag", opening[2]), text[opening.end() : tags[closing].start()]
        plain, place = tags[closing].end(), closing + 1
    if plain < len(text):
        yield "", text[plain:]


def _partners(tags: Sequence[re.Match[str]]) -> list[int | None]:
    """For each opening tag the place of the first closing one of its kind behind it."""
    partners: list[int | None] = [None] * len(tags)
    nearest: dict[str, int] = {}
    for place in reversed(range(len(tags))):
        slash, name = tags[place].groups()
        if slash:
            nearest[name] = place
        else:
            partners[place] = nearest.get(name)
    return partners


def from_list_format(items: Sequence[Mapping[str, Any]], *, blank: bool = True) -> str:
    """A list of elements as text; images are numbered in the list's order.

    Args:
        items: The elements.
        blank: Whether a blank stands before ``<img>``, as in Qwen-VL and Qwen-VL-Chat; the
            quantised Int4 release writes none.

    Raises:
        RowError: ``bad_markup``: an element is none of the three kinds.
    """
    written: list[str] = []
    pictures = 0
    for item in items:
        if "image" in item:
            pictures += 1
            gap = " " if blank else ""
            written.append(f"Picture {pictures}:{gap}<img>{item['image']}</img>\n")
        elif "text" in item:
            written.append(str(item["text"]))
        elif "box" in item:
            if "ref" in item:
                written.append(f"<ref>{item['ref']}</ref>")
            written += _boxes(item)
        else:
            raise _not_an_element(item)
    return "".join(written)


def to_list_format(text: str) -> list[dict[str, str]]:
    """The elements of a text; a box is its text between the tags, a phrase stands before its boxes.

    Raises:
        RowError: ``bad_markup``: the text holds a control token of the chat, as ``<|im_end|>``.
    """
    for token in CONTROLS:
        if token in text and token not in (*IMAGE_TAGS, END_OF_TEXT):
            raise RowError(
                "bad_markup",
                f"found the control token {token!r} in {text[:200]!r}; expected the text of one "
                "turn. Take the turns apart first",
            )
    names = {"": "text", "img": "image"}
    return [{names.get(tag, tag): content} for tag, content in elements(text)]


def _boxes(item: Mapping[str, Any]) -> list[str]:
    try:
        corners = [tuple(map(int, box)) for box in item["box"]]
    except (TypeError, ValueError) as error:
        raise _not_an_element(item) from error
    if any(len(each) != 4 for each in corners):
        raise _not_an_element(item)
    return [f"<box>({x1},{y1}),({x2},{y2})</box>" for x1, y1, x2, y2 in corners]


def _not_an_element(item: Mapping[str, Any]) -> RowError:
    return RowError(
        "bad_markup",
        f"found the element {dict(item)!r}; expected {{'image': …}}, {{'text': …}} or {{'box': "
        "[[x1, y1, x2, y2], …]} with or without 'ref'",
    )
