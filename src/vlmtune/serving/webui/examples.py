"""Rows of a data set to choose from, with their truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from vlmtune.data.conversation import Box, Conversation, Message, Part, Text
from vlmtune.data.dataset import PreparedDataset
from vlmtune.errors import UsageError
from vlmtune.serving.webui.history import Picture, Truth, Turn, asked
from vlmtune.serving.webui.pictures import Pictures

MOST = 12
SEARCHED = 200  # rows looked at: those with several questions are passed over
SPLITS = ("validation", "train")


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        id: The row's id.
        system: Its system turn, if it has one.
        parts: Its question.
        pictures: Its pictures.
        files: Their bytes as files, which a browser can send back.
        truth: Its answer.
    """

    id: str
    system: Message | None
    parts: tuple[Part, ...]
    pictures: tuple[Picture, ...]
    files: tuple[Path, ...]
    truth: Truth

    @property
    def text(self) -> str:
        """The question's texts."""
        return Turn(self.parts).text

    def matches(self, text: str, pictures: Sequence[Picture]) -> bool:
        """Whether a visitor asks just this."""
        same = [picture.sha256 for picture in pictures] == [one.sha256 for one in self.pictures]
        return same and text.strip() == self.text.strip()


def read_examples(dataset: str | Path, pictures: Pictures) -> list[Example]:
    """The first rows of a data set that hold one question about pictures.

    Args:
        dataset: A prepared data set; its validation split, or train where that is empty.
        pictures: Opens pictures, and keeps them as files.

    Raises:
        UsageError: If it is no prepared data set, or holds no such row.
        ImageError: If a picture cannot be opened.
    """
    opened = PreparedDataset.open(dataset)
    split = next((name for name in SPLITS if opened.info.splits.get(name)), SPLITS[-1])
    rows = opened.split(split)
    single = (row for row in islice(rows, SEARCHED) if _is_single(row))
    found = [_example(row, pictures) for row in islice(single, MOST)]
    if not found:
        raise UsageError(
            f"--data: {dataset} holds no row with pictures and one question among its first "
            f"{SEARCHED}; leave the option out"
        )
    return found


def turn_of(text: str, pictures: Sequence[Picture], examples: Sequence[Example]) -> Turn:
    """A visitor's question; one that is an example's is asked just as in the data set."""
    example = next((one for one in examples if one.matches(text, pictures)), None)
    if example is None:
        return Turn(asked(text, len(pictures)), tuple(pictures))
    return Turn(example.parts, example.pictures, truth=example.truth)


def system_of(
    text: str, pictures: Sequence[Picture], examples: Sequence[Example]
) -> Message | None:
    """The system turn of the example that a question is."""
    return next((one.system for one in examples if one.matches(text, pictures)), None)


def _is_single(row: Conversation) -> bool:
    roles = [message.role for message in row.messages if message.role != "system"]
    return roles == ["user", "assistant"] and bool(row.images)


def _example(row: Conversation, pictures: Pictures) -> Example:
    *before, answer = row.messages
    system = before[0] if before[0].role == "system" else None
    shown = tuple(pictures.show(image.data) for image in row.images)
    files = []
    for image, picture in zip(row.images, shown, strict=True):
        # The bytes as they came, under a name that tells a browser what they are.
        suffix = Path(image.path or "").suffix.lower() or picture.preview.suffix
        files.append(pictures.keep(f"{picture.sha256[:32]}-row{suffix}", image.data))
    boxes = [part for part in answer.content if isinstance(part, Box)]
    # Boxes are seen on the picture, with their labels.
    said = "".join(part.text for part in answer.content if isinstance(part, Text))
    truth = Truth(said, pictures.draw(boxes, shown))
    return Example(row.id, system, before[-1].content, shown, tuple(files), truth)
