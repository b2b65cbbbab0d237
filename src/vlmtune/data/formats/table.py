"""Tables: a column of images, one of texts, and perhaps questions, ids and system prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.data.conversation import Image, Message, Part, Text
from vlmtune.data.formats.draft import Draft, Read, Row, as_list, as_text, cell, keys_of, nearest
from vlmtune.data.formats.shape import Shape
from vlmtune.data.sources import FieldError
from vlmtune.errors import FormatError

# The columns of a table by what they are for, and the names they are found by.
COLUMNS: dict[str, tuple[str, ...]] = {
    "image": (
        "image",
        "images",
        "image_path",
        "img",
        "file_name",
        "file_names",
        "filename",
        "path",
        "picture",
    ),
    "text": ("text", "caption", "latex", "formula", "answer", "label", "output", "target"),
    "answers": ("answers", "captions", "references"),
    # ``input`` beside ``instruction`` is half of the question: not dropped, but asked about.
    "question": ("question", "query", "prompt", "instruction", "input"),
    "id": ("id", "image_id"),
    "system": ("system", "system_prompt"),
}
FOLDER_COLUMNS = ("file_name", "file_names")
# Columns that make rows something else than a table.
NOT_A_TABLE = ("messages", "conversations", "conversation", "annotations")


def is_table(shape: Shape) -> str:
    """Why rows are a table, or nothing."""
    if _is_otherwise(shape) or is_imagefolder(shape):
        return ""
    return "the rows are cells of named columns, not lists of turns"


def is_imagefolder(shape: Shape) -> str:
    """Why rows are of a Hugging Face image folder, or nothing."""
    column = next((name for name in FOLDER_COLUMNS if name in shape.keys), "")
    others = shape.keys.intersection(COLUMNS["image"]).difference((column,))
    if not column or others or _is_otherwise(shape):
        return ""
    return f"each row names its image file in {column!r}"


def _is_otherwise(shape: Shape) -> bool:
    pairs = shape.has("prompt", "completion") or shape.has("query", "response")
    return pairs or bool(shape.columns.intersection(NOT_A_TABLE))


def table(sample: Sequence[Row], columns: Mapping[str, str]) -> Read:
    """A table with a column of images and one of texts, and perhaps questions and ids.

    Raises:
        FormatError: A column that was asked for is not there, or it is not clear which one to take.
    """
    chosen = choose_columns(sample, columns)

    def read(row: Row) -> Draft:
        images = _images(row, chosen["image"]) if "image" in chosen else ()
        parts: list[Part] = [Image(index) for index in range(len(images))]
        question = _text(row, chosen, "question")
        if question.strip():
            parts.append(Text(question))
        if not parts:
            raise FieldError(
                "empty_question",
                "the row has neither an image nor a question; expected at least one",
                field=chosen.get("question", ""),
            )
        messages = [Message("user", tuple(parts))]
        system = _text(row, chosen, "system")
        if system.strip():
            messages.insert(0, Message("system", (Text(system),)))
        references = _answers(row, chosen["answers"]) if "answers" in chosen else ()
        text = as_text(cell(row, chosen["text"])) if "text" in chosen else ""
        if text.strip():
            messages.append(Message("assistant", (Text(text),)))
        elif "text" in chosen or not references:
            raise FieldError(
                "empty_answer",
                "the answer is empty; nothing could be trained on it",
                field=chosen.get("text", chosen.get("answers", "")),
            )
        return Draft(
            tuple(messages),
            images,
            references,
            id=_text(row, chosen, "id") or None,
            field=chosen.get("image", ""),
        )

    return read


def choose_columns(sample: Sequence[Row], asked: Mapping[str, str]) -> dict[str, str]:
    """Which column is for what: those asked for, the others by their names.

    Raises:
        FormatError: Naming the columns found, and the nearest name or all candidates.
    """
    found = keys_of(sample)
    _check_asked(sample, asked, found)
    chosen = dict(asked)
    taken = {name if name in found else name.split(".")[0] for name in asked.values()}
    for purpose, names in COLUMNS.items():
        if purpose in asked or (purpose == "text" and "answers" in asked):
            continue
        candidates = [
            name
            for name in found
            if name.lower() in names and name not in taken and _suits(purpose, sample, name)
        ]
        if purpose == "id":
            candidates = _id_candidates(candidates, sample, chosen)
        if len(candidates) > 1:
            raise FormatError(
                f"it is not clear which column holds the {purpose}: {', '.join(candidates)}. "
                f"Say so with --columns {purpose}={candidates[0]}"
            )
        if candidates:
            chosen[purpose] = candidates[0]
    _check_enough(chosen, found)
    return chosen


def _check_asked(sample: Sequence[Row], asked: Mapping[str, str], found: Sequence[str]) -> None:
    nested = [
        f"{name}.{key}"
        for name in found
        for key in keys_of([row[name] for row in sample if isinstance(row.get(name), Mapping)])
    ]
    for purpose, name in asked.items():
        if purpose not in COLUMNS:
            raise FormatError(
                f"--columns {purpose}={name}: unknown purpose {purpose!r}"
                f"{nearest(purpose, COLUMNS)}; expected one of {', '.join(COLUMNS)}"
            )
        if name not in found and not any(_holds(row, name) for row in sample):
            raise FormatError(
                f"--columns {purpose}={name}: there is no column {name!r}"
                f"{nearest(name, [*found, *nested])}; found {', '.join(found)}"
            )


def _holds(row: Row, name: str) -> bool:
    try:
        cell(row, name)
    except FieldError:
        return False
    return True


def _id_candidates(
    candidates: list[str], sample: Sequence[Row], chosen: Mapping[str, str]
) -> list[str]:
    """``id``; else ``image_id``, but only where it can be a row's: with one row an image."""
    if len(candidates) > 1:
        return [name for name in candidates if name.lower() == "id"]
    values = [as_text(row.get(name)) for name in candidates for row in sample]
    if candidates and candidates[0].lower() != "id":
        return candidates if "question" not in chosen and len(set(values)) == len(values) else []
    return candidates


def _check_enough(chosen: Mapping[str, str], found: Sequence[str]) -> None:
    listed = ", ".join(found) or "none"
    if "text" not in chosen and "answers" not in chosen:
        raise FormatError(
            f"no column of answers found among the columns {listed}; expected one called "
            f"{', '.join(COLUMNS['text'])}, or --columns text=NAME"
        )
    if "image" not in chosen and "question" not in chosen:
        raise FormatError(
            f"no column of images found among the columns {listed}; expected one called "
            f"{', '.join(COLUMNS['image'])}, or --columns image=NAME"
        )


def _suits(purpose: str, sample: Sequence[Row], name: str) -> bool:
    """Whether what stands in a column can be for ``purpose``: a struct, say, is no text."""
    if purpose != "text":
        return True
    values = [row[name] for row in sample if row.get(name) is not None]
    return not any(isinstance(value, dict | list) for value in values)


def _images(row: Row, name: str) -> tuple[Any, ...]:
    images = as_list(cell(row, name))
    if not images:
        raise FieldError("missing_field", f"{name!r} is empty; expected an image", field=name)
    return images


def _text(row: Row, chosen: Mapping[str, str], purpose: str) -> str:
    """A text that a row need not have."""
    name = chosen.get(purpose)
    return as_text(cell(row, name)) if name is not None and _holds(row, name) else ""


def _answers(row: Row, name: str) -> tuple[str, ...]:
    """Acceptable answers of a cell: a list, a list written as JSON, or a single text."""
    value = cell(row, name) if _holds(row, name) else None
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return (str(value),)
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in map(as_text, values) if text.strip())
