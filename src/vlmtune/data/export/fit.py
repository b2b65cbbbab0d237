"""Cuts a row to what a form can hold, and proves that the written row is read back as it was cut.

What cannot be cut off without changing what is asked or answered raises an error with its code: the
row is left out. What can be is a ``Loss``: the row is written, and the loss is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from vlmtune.data.boxes import from_grid, to_grid
from vlmtune.data.build import in_pixels, with_answer
from vlmtune.data.conversation import Box, Conversation, Image, Message, Part, Text, validate
from vlmtune.data.export.forms import Form
from vlmtune.data.formats.draft import Draft, tidy
from vlmtune.data.media import Size
from vlmtune.errors import RowError


class Loss(NamedTuple):
    """Something of a written row that is not in the file."""

    code: str
    message: str


def fit(row: Conversation, form: Form, sizes: Sequence[Size], losses: list[Loss]) -> Conversation:
    """The row as far as ``form`` can hold it.

    Args:
        row: A row of a prepared dataset.
        form: The form that it is written in.
        sizes: Upright sizes of its images.
        losses: What was cut is appended.

    Raises:
        RowError: The form cannot hold the row: ``several_turns``, ``system_prompt``,
            ``image_count``, ``image_in_answer``, ``part_order``, ``box``, ``bad_box``,
            ``mark_in_text``, or a code of ``conversation.validate``.
    """
    validate(row)
    _check_turns(row, form)
    _check_images(row, form)
    row = _joined(row, losses)
    _check_marks(row, form)
    if form.single:
        row = _single(row, form, losses)
    return _with_references(_with_boxes(row, form, sizes, losses), form, losses)


def _check_turns(row: Conversation, form: Form) -> None:
    turns = [message for message in row.messages if message.role != "system"]
    if form.single and len(turns) > 2:
        raise RowError(
            "several_turns",
            f"the row has {len(turns)} turns; the form holds one question and one answer",
        )
    if not form.system and len(turns) < len(row.messages):
        raise RowError("system_prompt", "the row has a system prompt; the form has no place for it")


def _check_images(row: Conversation, form: Form) -> None:
    if form.images is not None and len(row.images) != form.images:
        raise RowError(
            "image_count",
            f"the row has {len(row.images)} images; this table holds {form.images} a row",
        )
    shown = {
        message.role
        for message in row.messages
        if any(isinstance(part, Image) for part in message.content)
    }
    if not form.answers_show and "assistant" in shown:
        raise RowError(
            "image_in_answer", "an answer has an image; the form has images in questions only"
        )


def _joined(row: Conversation, losses: list[Loss]) -> Conversation:
    """Texts that follow each other as one: no form knows where one ends."""
    messages = tuple(replace(message, content=tidy(message.content)) for message in row.messages)
    if messages != row.messages:
        losses.append(
            Loss("texts_joined", "texts that follow each other are written as one; none is lost")
        )
    return replace(row, messages=messages)


def _check_marks(row: Conversation, form: Form) -> None:
    """Refuse texts that would be read as something else."""
    for message in row.messages:
        if message.role not in form.marked:
            continue
        for part in message.content:
            found = form.marks.search(part.text) if isinstance(part, Text) else None
            if found:
                raise RowError(
                    "mark_in_text",
                    f"the {message.role}'s text holds {found[0]!r}, which the form reads as the "
                    "place of an image or a box; it has no way to write the text itself",
                )


def _single(row: Conversation, form: Form, losses: list[Loss]) -> Conversation:
    """The row with its images before a question, or without one where the form has none."""
    messages = []
    for message in row.messages:
        content = message.content
        texts = [part for part in content if isinstance(part, Text)]
        if form.verbatim or message.role == "assistant":
            messages.append(message)
            continue
        if not form.questions and texts:
            losses.append(
                Loss("question", f"the question {texts[0].text[:80]!r} has no place in the form")
            )
            texts = []
        elif any(not text.text.strip() for text in texts) or not content:
            # An empty turn of the user's is refused by every reader; a system prompt is not there.
            losses.append(
                Loss("blank_text", f"the {message.role}'s text is blank, as an empty cell is")
            )
            texts = [text for text in texts if text.text.strip()]
        elif content and isinstance(content[0], Text) and len(content) > 1:
            raise RowError(
                "part_order", "a text stands before an image; the form has texts behind images"
            )
        images = [part for part in content if isinstance(part, Image)]
        if message.role == "user" or texts:
            boxes = [part for part in content if isinstance(part, Box)]
            messages.append(Message(message.role, (*images, *boxes, *texts)))
    return replace(row, messages=tuple(messages))


def _with_boxes(
    row: Conversation, form: Form, sizes: Sequence[Size], losses: list[Loss]
) -> Conversation:
    boxes = [part for part in row.parts() if isinstance(part, Box)]
    for box in boxes:
        if not 0 <= box.image < len(sizes) or not all(map(math.isfinite, box.xyxy)):
            raise RowError("bad_box", f"the box {box.xyxy} lies on no image of the row")
    if not boxes or form.boxes == "pixels":
        return row
    if form.boxes is None:
        raise RowError("box", f"the row has {len(boxes)} boxes; the form has no place for them")
    grid = form.boxes
    rounded: list[float] = []  # steps of the grid that each moved corner is off

    def on_grid(part: Part) -> Part:
        if not isinstance(part, Box):
            return part
        size = sizes[part.image]
        found = from_grid(to_grid(part.xyxy, size, grid), size, grid)
        if found != part.xyxy:
            sides = (*size, *size)
            steps = zip(found, part.xyxy, sides, strict=True)
            rounded.append(max(abs(new - old) * grid / side for new, old, side in steps))
        return replace(part, xyxy=found)

    messages = tuple(
        replace(message, content=tuple(map(on_grid, message.content))) for message in row.messages
    )
    inside = [steps for steps in rounded if steps <= 1 + 1e-9]
    if inside:
        losses.append(
            Loss(
                "box_rounded",
                f"{len(inside)} of {len(boxes)} boxes are rounded to {grid} steps a side, by "
                f"{max(inside):.2g} steps at most",
            )
        )
    if len(inside) < len(rounded):
        losses.append(
            Loss(
                "box_outside",
                f"{len(rounded) - len(inside)} of {len(boxes)} boxes lie outside of their image "
                f"and are cut at its edge, by {max(rounded):.3g} of {grid} steps at most",
            )
        )
    return replace(row, messages=messages)


def _with_references(row: Conversation, form: Form, losses: list[Loss]) -> Conversation:
    given = tuple(text for text in row.references if text.strip()) if form.references else ()
    held = with_answer(row.messages[-1], given)
    missing = [text for text in row.references if text not in held]
    if missing:
        losses.append(
            Loss(
                "references",
                f"{len(missing)} of {len(row.references)} acceptable answers have no place in the "
                "form; it holds the one trained on",
            )
        )
    return replace(row, references=held)


def check_read_back(
    draft: Draft, row: Conversation, paths: Sequence[str], sizes: Sequence[Size]
) -> None:
    """Compare a written row, as ``prepare`` reads it, with what was to be written.

    Raises:
        RowError: ``not_read_back``: they differ.
    """
    found = replace(
        row,
        id=draft.id or "",
        messages=in_pixels(draft.messages, draft, sizes),
        references=with_answer(draft.messages[-1], draft.references),
    )
    if found != row or draft.images != tuple(paths):
        names = ("id", "messages", "references")
        wrong = [name for name in names if _field(found, name) != _field(row, name)] or ["images"]
        raise RowError(
            "not_read_back",
            f"the form cannot say the row's {' and '.join(wrong)}: it would be read otherwise",
        )


def _field(row: Conversation, name: str) -> object:
    return {"id": row.id, "messages": row.messages, "references": row.references}[name]
