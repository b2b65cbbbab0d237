"""Rows that the forms of ``export`` hold or cannot hold, and ways to look at an export."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image as Pictures
from PIL import Image as Pillow

from vlmtune.data.boxes import from_grid
from vlmtune.data.conversation import (
    Box,
    Conversation,
    EncodedImage,
    Image,
    Message,
    Part,
    Role,
    Text,
)
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.export import FORMS, ExportResult
from vlmtune.data.media import Size
from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.data.writer import DatasetWriter

Make = Callable[..., Path]

SIZE = Size(40, 30)


def picture(number: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", SIZE, (number * 37 % 256, number * 11 % 256, 80)).save(buffer, form)
    return buffer.getvalue()


PICTURES = [picture(0), picture(1, "JPEG"), picture(2, "WEBP"), picture(3, "BMP")]


def user(*parts: Part | str) -> Message:
    return message("user", *parts)


def assistant(*parts: Part | str) -> Message:
    return message("assistant", *parts)


def message(role: Role, *parts: Part | str) -> Message:
    return Message(role, tuple(Text(part) if isinstance(part, str) else part for part in parts))


def row(*messages: Message, id: str = "1", **values: Any) -> Conversation:
    """A row as ``prepare`` makes one: its pictures, and its answer as the reference."""
    images = sum(isinstance(part, Image) for m in messages for part in m.content)
    boxes = any(isinstance(part, Box) for part in messages[-1].content)
    values.setdefault("references", () if boxes else (messages[-1].text,))
    encoded = tuple(EncodedImage(PICTURES[number % 4]) for number in range(images))
    return Conversation(id, messages, encoded, **values)


SIMPLE = row(user(Image(0), "What?"), assistant("A dog."))


def content(dataset: Path) -> dict[str, list[Any]]:
    """All that rows are, but for where they came from and what their files were called."""
    opened = PreparedDataset.open(dataset)
    return {
        split: [
            (r.id, r.messages, [image.data for image in r.images], r.references)
            for r in opened.split(split)
        ]
        for split in ("train", "validation")
    }


def again(result: ExportResult, out: Path, **options: Any) -> Path:
    """The export, prepared as it says itself."""
    prepare(result.path, out, PrepareOptions(**result.read_with, **options))
    return out


def losses_of(result: ExportResult) -> list[tuple[str, str, str]]:
    if result.report is None:
        return []
    lines = result.report.read_text(encoding="ascii").splitlines()
    return [(e["id"], e["code"], e["row"]) for e in map(json.loads, lines)]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_dataset(out: Path, *rows: Conversation, validation: int = 0) -> Path:
    """Writes a prepared dataset of rows as they are."""
    with DatasetWriter(out) as writer:
        for one in rows:
            writer.add(one)
        writer.finish(set(range(len(rows) - validation, len(rows))), "test", {})
        writer.publish()
    return out


# What every form holds, and what only some do.

GRID_BOX = from_grid((100, 200, 333, 999), SIZE, 1000)
ODD = (
    " \t\r\n 'quoted', \"double\"\n\n= -1 @x; <b> Picture 1: | \u3000 \u2028 é 图 \x00 \x7f \u202e"
)
TWO = (Image(0), Image(1))

HELD: dict[str, list[Conversation]] = {
    "csv": [
        SIMPLE,
        row(user(Image(0)), assistant("=1+1"), id="=2"),
        row(user(Image(0), ODD), assistant(ODD), id="odd"),
        row(user(Image(0), "q"), assistant("b"), references=("a", "b", "[c", "-1"), id="several"),
        row(user(Image(0), "["), assistant("[1, 2]"), id="a list"),
        row(message("system", "+ be"), user(Image(0), "-1"), assistant("-1"), id="-1"),
        row(user(Image(0), "'=1"), assistant("''"), id="apostrophes"),
    ],
    "tutorial-ocr": [
        row(user(Image(0)), assistant(r"\frac{1}{2}")),
        row(user(Image(0)), assistant(ODD + "<|vision_start|>"), id="../é 图"),
    ],
    "tutorial-caption": [
        row(user("COCO Yes: ", Image(0)), assistant("A cat.")),
        row(user(Image(0)), assistant("<|vision_start|>x<|vision_end|>"), id="2"),
        row(user(ODD, Image(0), ODD), assistant(ODD), id="3"),
    ],
    "qwen": [
        SIMPLE,
        row(user("1+1?"), assistant("2"), user(Image(0), "Und?\n"), assistant("x"), id="turns"),
        row(user(*TWO, "A"), assistant(Box(1, "a", GRID_BOX), Box(1, "a", GRID_BOX)), id="boxes"),
        row(
            user(Image(0), "?"), assistant("x", Box(0, "", GRID_BOX), Box(0, "", GRID_BOX)), id="b"
        ),
        row(message("system", "Be."), user(Image(0), "?"), assistant(Image(1), "y"), id="shown"),
        row(user(Image(0), "\n\nx"), assistant("(1,2)"), id="breaks"),
        row(user(Image(0)), assistant(Box(0, "a", GRID_BOX), Box(0, "", GRID_BOX)), id="unnamed"),
    ],
    "llava": [
        SIMPLE,
        row(user("\n", Image(0), "\n", Image(1), "\n\n", Image(2)), assistant("\n<image>\n")),
        row(user(*TWO), assistant("x"), user("y", Image(2)), assistant(ODD), id="turns"),
        row(message("system", ODD), user("no image"), assistant("x"), id="text"),
    ],
    "sharegpt": [
        SIMPLE,
        row(user("\n", Image(0), "\n", *(Image(1), "x")), assistant("<image>"), id="i"),
        row(message("system", ODD), user("no image"), assistant("x"), id="text"),
    ],
    "messages": [
        SIMPLE,
        row(message("system", "<image>"), user("<image>", Image(0)), assistant("<bbox>"), id="m"),
        row(user(*TWO, "?"), assistant(Image(2), ODD), user("a"), assistant("b"), id="turns"),
    ],
    "trl": [
        SIMPLE,
        row(message("system", "<image>"), user("<image>", Image(0)), assistant("<bbox>"), id="m"),
        row(user(*TWO, "?"), assistant(Image(2), ODD), user("a"), assistant("b"), id="turns"),
        row(user("no image"), assistant("x"), id="text"),
    ],
    "swift": [
        SIMPLE,
        row(
            user(*TWO, "Where is ", Box(0, "<bbox>", (0.1, 1 / 3, 7.0, 1e2)), "?"),
            assistant("a", Box(1, "", (1, 2, 3, 4)), Box(0, "b", (-5.5, 0, 400.25, 3e7))),
            id="boxes",
        ),
        row(user(ODD), assistant("<ref> <box> <|box_start|>"), id="text"),
    ],
}


def unique(rows: Sequence[Conversation]) -> list[Conversation]:
    return [replace(one, id=f"{one.id}#{number}") for number, one in enumerate(rows)]


def apart(one: Conversation) -> Conversation:
    """The row with pictures of its own, of the same size and kind."""
    images = []
    for image in one.images:
        with Pictures.open(io.BytesIO(image.data)) as picture:
            kind, other = picture.format, Pictures.new(picture.mode, picture.size)
        stream = io.BytesIO()
        other.save(stream, kind)
        images.append(replace(image, data=stream.getvalue()))
    return replace(one, images=tuple(images))


BOXED = row(user(Image(0), "?"), assistant(Box(0, "a", GRID_BOX)))
TURNS = row(user(Image(0), "?"), assistant("a"), user("?"), assistant("b"))
PROMPTED = row(message("system", "Be brief."), user(Image(0)), assistant("a"))
MARKED = row(user(Image(0), "Write <image>"), assistant("a"))
OUTSIDE = row(user(Image(0), "?"), assistant(Box(0, "a", (-30.0, 0.0, 40.0, 30.0))))


IMAGELESS = [name for name, form in FORMS.items() if not name.startswith("tutorial")]


def good(name: str) -> Conversation:
    imageless = name not in IMAGELESS or name == "csv"
    return row(user(Image(0)) if imageless else user("q"), assistant("good"), id="good")
