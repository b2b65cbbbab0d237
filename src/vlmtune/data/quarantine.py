"""The ledger of rows that were left out: what, where, why, and what to do about it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vlmtune.data.records import FieldError, Record
from vlmtune.errors import DataError

# A data URL or a page of text in a cell is not copied into the ledger.
LONGEST_TEXT = 2000
MOST_ENTRIES = 200

_URL = re.compile(r"(https?://)(?:[^/@\s]*@)?([^\s?#]*)\S*", re.IGNORECASE)

# What a user can do, by code. The message says what is wrong with this row.
HINTS: dict[str, str] = {
    "bad_box": "write the box as x1 <= x2 and y1 <= y2 on one of the row's images",
    "bad_data_url": "write data:image/png;base64, and the image in base64",
    "bad_json": "mend the line so that it is one JSON object",
    "bad_markup": "close every <img>, <ref>, <box> and <quad>",
    "bad_part": "leave texts and images in the content",
    "bad_role": "name the turns user and assistant",
    "bad_row": "mend the row so that it has the cells the header names",
    "bad_split": "write train, validation, val or test into the split's column",
    "bad_text": "mend the text's encoding: it holds half a character (a lone surrogate)",
    "box_mismatch": "place as many <ref-object> and <bbox> as 'objects' has",
    "duplicate_id": "give the row an id of its own, or drop it",
    "empty_answer": "write the answer, or drop the row",
    "empty_conversation": "write a user's and an assistant's turn",
    "empty_question": "give the row an image or a question",
    "image_broken": "export or download the image again",
    "image_empty": "copy or download the image again",
    "image_mismatch": "place each of the row's images once, in order",
    "image_missing": "put the file there, correct the path, or name its folder with --images-root",
    "image_not_an_image": "name an image file (PNG, JPEG, WebP, …)",
    "image_too_large": "make the image smaller",
    "image_too_stretched": "crop the image",
    "image_truncated": "copy or download the image again",
    "image_unreadable": "make the file readable",
    "loss_masked": "drop the row, or let its answer be trained",
    "media_unsupported": "drop the row, or turn it into images",
    "missing_field": "fill in the field, or name another column with --columns",
    "no_answer": "end the row with an assistant's turn",
    "not_a_file": "name a regular file",
    "path_outside": "name the folder of the images with --images-root",
    "role_order": "let user and assistant take turns",
    "size_mismatch": "name the image that was annotated, or scale the boxes",
    "url_bad_answer": "open the address in a browser; if it shows no image, drop the row",
    "url_not_allowed": "download the images and name the files, or say --allow-urls",
    "url_timeout": "prepare again later, or download the image and name the file",
    "url_too_large": "make the image smaller, or download it and name the file",
    "url_unreachable": "correct the address, or download the image and name the file",
}


class Quarantine:
    """Writes ``quarantine.jsonl``: a line a row, in the source's order, equal for equal input.

    Attributes:
        codes: Rows by code.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.codes: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._file = self._path.open("w", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __len__(self) -> int:
        return self.codes.total()

    def add(self, code: str, line: str) -> None:
        """Note a row that was left out.

        Args:
            code: Why.
            line: Its ``entry_line``.
        """
        self.codes[code] += 1
        self._file.write(line)


def entry_line(record: Record, identity: str, fault: DataError) -> str:
    """The line that says of ``record`` that it was left out because of ``fault``."""
    entry: dict[str, Any] = {
        "source": record.where,
        "id": _shortened(identity),
        "field": "",
        "code": fault.code,
        "message": _shortened(str(fault)),
        "hint": HINTS.get(fault.code, "mend the row, or drop it"),
    }
    if isinstance(fault, FieldError):
        entry["field"] = fault.field
        entry["value"] = "" if fault.value is None else visible(_start_of(fault.value))
        if fault.data:
            entry["image"] = _digest(fault.data)
    entry["row"] = _shortened(record.fields)
    # ASCII only: a line break or a direction mark in a row must not reach a terminal.
    return json.dumps(entry, default=str) + "\n"


def _start_of(value: Any) -> str:
    return str(value if isinstance(value, str) else _shortened(value))[:200]


def _shortened(value: Any) -> Any:
    """``value`` as JSON may hold it, without what is large.

    Of bytes and long texts hash, length and start, of long lists the first entries, of URLs
    neither user, password nor query, where keys stand.
    """
    match value:
        case bytes() | bytearray():
            return _digest(value)
        case str() if len(value) > LONGEST_TEXT:
            raw = value.encode("utf-8", "surrogatepass")
            digest = hashlib.sha256(raw).hexdigest()
            return {"start": value[:200], "characters": len(value), "sha256": digest}
        case str() if url := _URL.fullmatch(value):
            return url[1] + url[2]
        case Mapping():
            return {str(key)[:200]: _shortened(cell) for key, cell in value.items()}
        case list() | tuple():
            left_out = len(value) - MOST_ENTRIES
            first = [_shortened(cell) for cell in value[:MOST_ENTRIES]]
            return [*first, f"… and {left_out:,} more"] if left_out > 0 else first
    return value


def visible(text: str) -> str:
    """``text`` with control and direction characters written out as escapes."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )


def _digest(data: bytes | bytearray) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def read_quarantine(path: Path) -> list[Mapping[str, Any]]:
    """The entries of a ``quarantine.jsonl``."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
