"""The rows of a report: picture, truth, answers side by side, and what is wrong in each answer."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from rapidfuzz.distance import Indel, Levenshtein

from vlmtune.data.media import ImagePolicy, open_image
from vlmtune.errors import ImageError
from vlmtune.evaluation.markup import Html, group, tag
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.report_content import ReportContent, ReportRow, figure

THUMBNAIL = (640, 960)  # pixels, at most
SMALL_PNG = 48 * 1024  # bytes; a larger thumbnail is tried as JPEG
LONGEST = 1200  # characters of a text that are shown
SAME = 2  # an equal stretch this short between two faults is chance, not agreement


def thumbnail(data: bytes) -> str:
    """The picture, upright and at most 640 pixels wide, as a data URI.

    Raises:
        ImageError: If it cannot be opened.
    """
    picture = open_image(data, ImagePolicy())
    picture.thumbnail(THUMBNAIL)
    picture.info = {}  # a comment in the file is nobody's business, and its profile is not applied
    encoded, kind = io.BytesIO(), "png"
    picture.save(encoded, "PNG", optimize=True)
    if encoded.tell() > SMALL_PNG:
        smaller = io.BytesIO()
        picture.save(smaller, "JPEG", quality=82, optimize=True)
        if smaller.tell() < encoded.tell():
            encoded, kind = smaller, "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"


def cards(rows: Sequence[ReportRow], content: ReportContent) -> Html:
    """One card a row."""
    return group(group(["\n", card(row, content)]) for row in rows)


def card(row: ReportRow, content: ReportContent) -> Html:
    """A row: its picture, the truth, and each answer with its faults marked."""
    columns = [_column("Truth", _shown(row.truth[0] if row.truth else ""), class_="truth")]
    for label, answer, score in (
        ("Before", row.before, row.score_before),
        ("After", row.after, row.score_after),
    ):
        if answer is not None:
            columns.append(_column(label, faults(answer, row.truth), score, class_=label.lower()))
    others = [tag("span", _cut(text), dir="auto") for text in row.truth[1:]]
    also = tag("p", tag("b", "Also accepted: "), group(_joined(others)), class_="also")
    return tag(
        "article",
        tag("header", tag("h4", row.id, dir="auto"), _change(row, content)),
        _picture(row),
        tag("p", _cut(row.question), class_="question", dir="auto") if row.question else "",
        tag("div", *columns, class_="columns"),
        also if others else "",
        class_="row",
    )


def _joined(parts: Sequence[Html]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        joined += [" · ", part] if joined else [part]
    return joined


def _column(label: str, text: Html, score: float | None = None, *, class_: str) -> Html:
    title = tag(
        "h5", label, tag("span", figure(score), class_="score") if score is not None else ""
    )
    return tag("div", title, tag("div", text, class_="text", dir="auto"), class_=f"column {class_}")


def _change(row: ReportRow, content: ReportContent) -> Html:
    """The row's change in words, coloured by whether it is an improvement."""
    if row.score_before is None or row.score_after is None or not content.metrics:
        return Html("")
    gain = row.score_after - row.score_before
    if figure(gain) == "0.000":
        return tag("span", "unchanged", class_="badge none")
    improved = (gain > 0) == find(content.metrics[0]).higher_is_better
    words = f"{'+' if gain > 0 else ''}{figure(gain)}"
    return tag("span", words, class_=f"badge {'better' if improved else 'worse'}")


def _picture(row: ReportRow) -> Html:
    if row.image is None:
        return Html("")
    try:
        source = thumbnail(row.image)
    except ImageError as error:
        return tag("p", f"The picture cannot be shown ({error.code}).", class_="muted")
    return tag("div", tag("img", src=source, alt=f"picture of {row.id}"), class_="picture")


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} … and {len(text) - LONGEST:,} more characters"


def _shown(text: str) -> Html:
    return group([_cut(text)]) if text else tag("em", "empty", class_="muted")


def faults(answer: str, truth: Sequence[str]) -> Html:
    """The answer with what should not be there marked, and what is missing struck in.

    It is compared with the closest reference, character by character, in the first 1200 characters
    of both; where one of them is longer, that is said.
    """
    if not truth:
        return _shown(answer)
    closest = max(truth, key=lambda text: Levenshtein.normalized_similarity(answer, text))
    expected, written = closest[:LONGEST], answer[:LONGEST]
    pieces: list[str] = []
    for missing, extra, same in differences(expected, written):
        pieces += [
            tag("del", missing, title="missing") if missing else "",
            tag("ins", extra, title="not in the truth") if extra else "",
            same,
        ]
    if not written:
        pieces.insert(0, tag("em", "empty ", class_="muted"))
    if max(len(answer), len(closest)) > LONGEST:
        words = (
            f" … compared in their first {LONGEST:,} characters: the answer has {len(answer):,}, "
            f"the truth {len(closest):,}"
        )
        pieces.append(tag("em", words, class_="muted"))
    return group(pieces)


def differences(expected: str, written: str) -> list[tuple[str, str, str]]:
    """Runs of (missing, extra, same): with ``same``, they spell ``expected`` and ``written``.

    The longest common subsequence, but for stretches too short to mean agreement. difflib's would
    take seconds where a model repeats itself.
    """
    runs: list[tuple[str, str, str]] = []
    at_expected = at_written = 0
    for start, begin, size in Indel.editops(expected, written).as_matching_blocks():
        inner = size and (start, begin) != (0, 0) and start + size < len(expected)
        if inner and len(written[begin : begin + size].strip()) < SAME:
            continue
        missing, extra = expected[at_expected:start], written[at_written:begin]
        if missing or extra or size:
            runs.append((missing, extra, written[begin : begin + size]))
        at_expected, at_written = start + size, begin + size
    return runs
