"""What was said in one visitor's conversation, and what each model is asked next. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlmtune.data.conversation import Box, Conversation, EncodedImage, Image, Message, Part, Text

State = Literal["speaking", "done", "length", "stopped", "failed"]


@dataclass(frozen=True)
class Picture:
    """A picture that a visitor showed.

    Attributes:
        data: Its file's bytes, as they came.
        sha256: Of the bytes.
        preview: The upright picture in a form every browser shows.
    """

    data: bytes = field(repr=False)
    sha256: str
    preview: Path


@dataclass(frozen=True)
class Truth:
    """The answer that a data set holds.

    Attributes:
        text: Its texts.
        drawn: Its boxes, drawn on their pictures.
    """

    text: str
    drawn: tuple[Path, ...] = ()


@dataclass
class Reply:
    """One model's answer as it grows.

    Attributes:
        text: What was said so far.
        boxes: Boxes of a whole answer; ``Box.image`` counts the pictures that this model was shown.
        drawn: The boxes on the pictures they belong to.
        state: ``length``: the longest answer was reached; ``stopped``: the visitor broke it off.
        fault: Why there is no answer, or no rest of it.
        prompt_tokens: Tokens of the question with all that was said before.
        tokens: Tokens that were said.
        seconds: From asking to the end.
    """

    text: str = ""
    boxes: tuple[Box, ...] = ()
    drawn: tuple[Path, ...] = ()
    state: State = "speaking"
    fault: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def remembered(self) -> bool:
        """Whether it stays in the conversation: a question that got no word leaves no trace."""
        return bool(self.text) or self.state in ("done", "length")


@dataclass
class Turn:
    """A question and its answers.

    Attributes:
        parts: What was asked; ``Image.index`` counts ``pictures`` from 0.
        pictures: The turn's own pictures.
        replies: One a model.
        truth: What a data set holds as the answer.
    """

    parts: tuple[Part, ...]
    pictures: tuple[Picture, ...] = ()
    replies: list[Reply] = field(default_factory=list)
    truth: Truth | None = None

    @property
    def text(self) -> str:
        """The question's texts."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass
class History:
    """One visitor's conversation.

    Attributes:
        turns: The oldest first.
        system: A system turn that came with an example of a data set.
        run: Counts what was asked, so that an answer knows when it is no longer wanted.
    """

    turns: list[Turn] = field(default_factory=list)
    system: Message | None = None
    run: int = 0

    def clear(self) -> None:
        """Forget everything."""
        self.turns, self.system = [], None
        self.run += 1

    def add(self, turn: Turn) -> None:
        """A new question."""
        self.turns.append(turn)
        self.run += 1

    def again(self, index: int) -> None:
        """Ask a question once more; what was said after it is gone."""
        del self.turns[index + 1 :]
        self.turns[index].replies = []
        self.run += 1

    def edit(self, index: int, text: str) -> None:
        """Ask another question in place of an earlier one, about the same pictures."""
        turn = self.turns[index]
        if text != turn.text:
            turn.parts, turn.truth = asked(text, len(turn.pictures)), None
        self.again(index)

    @property
    def pictures(self) -> int:
        """Pictures of all turns."""
        return sum(len(turn.pictures) for turn in self.turns)

    @property
    def characters(self) -> int:
        """Characters of all questions and answers."""
        said = (len(reply.text) for turn in self.turns for reply in turn.replies)
        return sum(len(turn.text) for turn in self.turns) + sum(said)

    def remembered(self, side: int) -> Iterator[Turn]:
        """The turns that a model is shown: the last, and those before it that it answered."""
        for turn in self.turns[:-1]:
            if side < len(turn.replies) and turn.replies[side].remembered:
                yield turn
        yield self.turns[-1]

    def question(self, side: int) -> Conversation:
        """What a model is asked: its own earlier answers, and the last question."""
        messages: list[Message] = [self.system] if self.system else []
        pictures: list[Picture] = []
        for turn in self.remembered(side):
            messages.append(Message("user", _moved(turn.parts, len(pictures))))
            pictures += turn.pictures
            if turn is not self.turns[-1]:
                messages.append(Message("assistant", (Text(turn.replies[side].text),)))
        images = tuple(EncodedImage(picture.data) for picture in pictures)
        return Conversation("page", tuple(messages), images)

    def shown_to(self, side: int) -> list[Picture]:
        """The pictures of ``question``, in its order."""
        return [picture for turn in self.remembered(side) for picture in turn.pictures]


def asked(text: str, pictures: int) -> tuple[Part, ...]:
    """A question as people ask it: pictures first, then the text."""
    parts: list[Part] = [Image(index) for index in range(pictures)]
    return (*parts, Text(text)) if text else tuple(parts)


def by_picture(boxes: Sequence[Box], pictures: int) -> dict[int, list[Box]]:
    """Boxes by the place of the picture they belong to, in order of the pictures."""
    table: dict[int, list[Box]] = {}
    for place in sorted({box.image for box in boxes}):
        if 0 <= place < pictures:
            table[place] = [box for box in boxes if box.image == place]
    return table


def _moved(parts: Sequence[Part], start: int) -> tuple[Part, ...]:
    """Parts whose pictures are counted from ``start``."""
    moved: list[Part] = []
    for part in parts:
        if isinstance(part, Image):
            moved.append(Image(part.index + start))
        elif isinstance(part, Box):
            moved.append(Box(part.image + start, part.label, part.xyxy))
        else:
            moved.append(part)
    return tuple(moved)
