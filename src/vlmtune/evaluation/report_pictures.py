"""The pictures of a report: reduced originals, boxes drawn on them, formulas set as formulas."""

from __future__ import annotations

import base64
import io
import math
import re
import time

from PIL import Image

from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size, open_image
from vlmtune.errors import ImageError
from vlmtune.evaluation.markup import Html, group, tag
from vlmtune.evaluation.overlay import Mark, data_uri, drawing
from vlmtune.evaluation.rendering import ink
from vlmtune.evaluation.report_content import ReportContent, ReportRow
from vlmtune.evaluation.report_texts import LONGEST

THUMBNAIL = (640, 960)  # pixels, at most
LARGEST = 256 * 1024  # characters of an encoded picture
SHRINK = 0.7  # a picture above that is made smaller until it is not
ALBUM = 16 * 2**20  # characters of all pictures of a page
SHORTEST = 360  # units; a small picture with boxes is shown larger, so that labels can be read
MOST_TIMES = 6.0  # larger
DRAWING_SECONDS = 30.0  # for all formulas of a page
TRUE_COLOUR, ANSWER_COLOUR = "#1b7f3b", "#c2410c"  # green and orange, dark enough for white letters
SHOWN = 2 / 3  # of a formula's drawn size
MOST_MARKS = 60  # boxes on one picture

# A command, or a script in braces; snake_case and 10^6 are in plain texts too.
_LATEX = re.compile(r"\\[A-Za-z]|[_^]\s*\{")
_DOLLARS = re.compile(r"^\s*(\$\$?|\\\[|\\\()(.*?)(\$\$?|\\\]|\\\))\s*$", re.DOTALL)


class Album:
    """The pictures of one page, within its bounds of size and time.

    Args:
        content: What the report says.
    """

    def __init__(self, content: ReportContent) -> None:
        self.formulas = are_formulas(content)
        self._room, self._seconds = ALBUM, DRAWING_SECONDS

    def pictures(self, row: ReportRow) -> Html:
        """A row's pictures with its boxes, and what they mean."""
        boxes = bool(row.true_boxes or row.boxes)
        shown = [self._picture(row, number) for number in range(len(row.images))]
        if not shown:
            return Html("")
        left = row.pictures - len(row.images)
        words = f"and {left:,} more picture{'' if left == 1 else 's'} that are not shown here"
        return group(
            [
                tag("div", *shown, class_="picture"),
                _legend(row) if boxes else "",
                tag("p", words, class_="muted") if left > 0 else "",
            ]
        )

    def formula(self, text: str, what: str) -> Html:
        """A text set as a formula; nothing where the rows are not formulas.

        Args:
            text: LaTeX, as a model or a person wrote it.
            what: Whose, for those who cannot see it.
        """
        if not self.formulas or not text.strip():
            return Html("")
        drawn = self._drawn(text)
        if isinstance(drawn, str):
            return tag("p", drawn, class_="formula muted")
        width, height = drawn.size
        encoded = io.BytesIO()
        drawn.save(encoded, "PNG", optimize=True)
        source = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"
        self._room -= len(source)
        # Drawn larger than it is shown, for sharp screens.
        sides = {"width": str(math.ceil(width * SHOWN)), "height": str(math.ceil(height * SHOWN))}
        img = tag("img", src=source, alt=what, **sides)
        return tag("div", img, class_="formula")

    def _drawn(self, text: str) -> Image.Image | str:
        """The formula, or why there is none."""
        if len(text) > LONGEST:
            return f"not set as a formula: longer than {LONGEST:,} characters"
        if self._seconds <= 0 or self._room <= 0:
            return "not set as a formula: the page's bound is reached"
        began = time.monotonic()
        found = ink(bare(text))
        self._seconds -= time.monotonic() - began
        if found is None:
            return "cannot be set as a formula"
        return Image.fromarray(~found)

    def _picture(self, row: ReportRow, number: int) -> Html:
        if self._room <= 0:
            return tag("p", "left out: this page holds no more pictures", class_="muted")
        try:
            source, size, original = thumbnail(row.images[number])
        except ImageError as error:
            return tag("p", f"The picture cannot be shown ({error.code}).", class_="muted")
        self._room -= len(source)
        marks = marks_of(row, number, size.width / original.width, size.height / original.height)
        alt = f"picture of {row.id}" + (f", number {number + 1}" if row.pictures > 1 else "")
        if not marks:
            return tag("img", src=source, alt=alt)
        scale = max(1.0, min(MOST_TIMES, SHORTEST / max(size)))
        return drawing(source, size, marks, scale=scale, alt=alt)


def thumbnail(data: bytes) -> tuple[str, Size, Size]:
    """The picture, upright and at most 640 pixels wide, as a data URI; its size there and before.

    Raises:
        ImageError: If it cannot be opened.
    """
    picture = open_image(data, ImagePolicy())
    original = Size(*picture.size)
    picture.thumbnail(THUMBNAIL)
    picture.info = {}  # a comment in the file is nobody's business, and its profile is not applied
    source = data_uri(picture)
    while len(source) > LARGEST:
        smaller = tuple(max(1, round(side * SHRINK)) for side in picture.size)
        picture = picture.resize((smaller[0], smaller[1]), Image.Resampling.LANCZOS)
        source = data_uri(picture)
    return source, Size(*picture.size), original


def marks_of(row: ReportRow, number: int, across: float, down: float) -> list[Mark]:
    """True boxes and the answer's on one picture, scaled."""
    pairs = ((row.true_boxes, TRUE_COLOUR, False), (row.boxes, ANSWER_COLOUR, True))
    return [
        Mark(box.label, _scaled(box, across, down), colour, dashed)
        for boxes, colour, dashed in pairs
        for box in [each for each in boxes if each.image == number][:MOST_MARKS]
    ]


def _scaled(box: Box, across: float, down: float) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box.xyxy
    return x1 * across, y1 * down, x2 * across, y2 * down


def _legend(row: ReportRow) -> Html:
    def key(colour: str, dashed: bool, words: str) -> Html:
        line = tag(
            "line",
            x1="0",
            y1="5",
            x2="26",
            y2="5",
            stroke=colour,
            stroke_width="2.5",
            stroke_dasharray="7 4" if dashed else None,
        )
        svg = tag("svg", line, viewBox="0 0 26 10", class_="swatch", aria_hidden="true")
        return tag("span", svg, words)

    when = "before training" if row.after is None else "after training"
    true, said = len(row.true_boxes), len(row.boxes)
    more = max(true, said) > MOST_MARKS
    return tag(
        "p",
        key(TRUE_COLOUR, False, f"truth ({true:,})"),
        key(ANSWER_COLOUR, True, f"the answer {when} ({said:,})"),
        tag("span", f"at most {MOST_MARKS} of each are drawn on a picture") if more else "",
        class_="boxes",
    )


def are_formulas(content: ReportContent) -> bool:
    """Whether most of the true answers are LaTeX."""
    truths = [row.truth[0] for row in content.rows if row.truth]
    return sum(bool(_LATEX.search(text)) for text in truths) * 2 > len(truths)


def bare(text: str) -> str:
    r"""A formula without the ``$`` or ``\[`` around it."""
    found = _DOLLARS.match(text)
    return found[2] if found else text
