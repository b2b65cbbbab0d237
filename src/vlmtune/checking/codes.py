"""Every code of ``check``: how serious it is, what it means, what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmtune.data.quarantine import HINTS

Severity = Literal["stop", "note"]


@dataclass(frozen=True, slots=True)
class Code:
    """A kind of finding.

    Attributes:
        severity: ``stop`` where training would lose the row, or its result could not be believed.
        meaning: What it is, in a few words.
        advice: What to do.
        limit: Findings that are still only a note: a count, or (as a float) a part of all rows.
    """

    severity: Severity
    meaning: str
    advice: str
    limit: int | float = 0


def _stop(meaning: str, advice: str, limit: float = 0) -> Code:
    return Code("stop", meaning, advice, limit)


def _note(meaning: str, advice: str) -> Code:
    return Code("note", meaning, advice)


CODES: dict[str, Code] = {
    # The row as a conversation.
    "duplicate_id": _stop("an id occurs twice", HINTS["duplicate_id"]),
    "empty_conversation": _stop("no turns", HINTS["empty_conversation"]),
    "role_order": _stop("turns out of order", HINTS["role_order"]),
    "no_answer": _stop("no answer at the end", HINTS["no_answer"]),
    "empty_answer": _stop("an empty answer", HINTS["empty_answer"]),
    "no_labels": _stop("nothing in it is trained", "look at it with vlmtune inspect; mend the row"),
    "image_mismatch": _stop("placeholders are not the images", HINTS["image_mismatch"]),
    "too_long": _stop(
        "more tokens than data.max_length: left out, never cut",
        "raise data.max_length, or lower image.max_pixels",
        limit=0.01,
    ),
    "control_token": _note(
        "a control token stands in a text", "it is encoded as plain text; remove leftover markup"
    ),
    # Its pictures.
    "image_empty": _stop("an image of 0 bytes", HINTS["image_empty"]),
    "image_not_an_image": _stop("a file that is no image", HINTS["image_not_an_image"]),
    "image_broken": _stop("a damaged image", HINTS["image_broken"]),
    "image_truncated": _stop("an image that ends too early", HINTS["image_truncated"]),
    "image_too_large": _stop("more pixels than image.max_source_pixels", HINTS["image_too_large"]),
    "image_too_stretched": _stop("too long and thin for the model", HINTS["image_too_stretched"]),
    "image_too_small": _note(
        "enlarged more than twice: the model sees a blur", "use the original picture"
    ),
    "image_shrunk": _note(
        "shrunk to less than a third: fine print is lost", "raise image.max_pixels, or crop"
    ),
    "image_squeezed": _note(
        "the model's grid changes its aspect by half or more", "enlarge or pad the picture"
    ),
    "image_cropped": _note(
        "the model's own processor cuts the edges off",
        "pad the picture to a square, or squeeze it whole into the model's with image.size",
    ),
    "transparent": _note("transparency", "it is composed on image.background; is that right?"),
    "rotated": _note("an EXIF orientation", "it is applied; are boxes meant for the upright one?"),
    "sixteen_bit": _note("more than 8 bits a channel", "it is scaled to 8 bits, never clipped"),
    "cmyk": _note("CMYK colours", "they are converted without a profile; export as RGB to be sure"),
    "animated": _note("an animation or several pages", "only the first frame is seen; split it"),
    # Its boxes.
    "box_without_image": _stop("a box on an image that is not there", "correct the box's image"),
    "box_outside": _stop("a box outside its image", "boxes are pixels of the upright original"),
    "box_inverted": _stop("a box without area", "write x1 < x2 and y1 < y2"),
    # Rows beside each other.
    "leak": _stop(
        "a row of the training split, answer and all, in validation", "take it out of one split"
    ),
    "near_leak": _note(
        "nearly a picture of the training split, in validation", "keep look-alikes in one split"
    ),
    "image_in_both": _note(
        "a picture of the training split, in validation", "split by picture, not by row"
    ),
    "duplicate": _note("the same row twice", "drop one; it counts double"),
    "near_duplicate": _note("nearly the same picture twice", "look at both; drop one"),
    "conflicting_answers": _note(
        "one picture and question, two answers", "mend the wrong one, unless several are right"
    ),
    "answer_length": _note("an answer far longer or shorter than the rest", "look at it"),
    "class_imbalance": _note(
        "a class ten times rarer than the largest", "add rows; read macro_f1, not accuracy"
    ),
    "class_unseen": _note("a class that only validation has", "add rows of it to training"),
    "one_answer": _note("every answer is the same", "is the right column the answer?"),
}


def code_of(name: str) -> Code:
    """What is known of a code; one that is not listed stops."""
    return CODES.get(name) or _stop(name.replace("_", " "), HINTS.get(name, "mend the row"))
