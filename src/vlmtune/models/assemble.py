"""From the items of a template to token ids, labels and image places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal as Literal_

import numpy as np

from vlmtune.data.conversation import Box, Message, Part, Text
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ModelError
from vlmtune.models.family import Family, Piece, Tokens
from vlmtune.models.plain_text import Place, Stripping, TextTokenizer
from vlmtune.models.skeleton import ImageSlot, Item, Literal, Opening, Slot

IGNORED = -100
TokenKind = Literal_["template", "question", "answer", "control", "image"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What decides how items become tokens.

    Attributes:
        family: The family, for its images and boxes.
        policy: The image policy of the contract.
        text: Encodes plain text.
        controls: Ids of the vocabulary's control tokens.
        stripping: Control tokens that swallow white space.
        end: Id of the token that ends an answer.
        adds_end: Whether the end is added because the template writes none.
    """

    family: Family
    policy: ImagePolicy
    text: TextTokenizer
    controls: Mapping[str, int]
    stripping: Stripping
    end: int
    adds_end: bool

    @property
    def collapsing(self) -> int | None:
        """Id of the control token of which two in a row become one."""
        token = self.family.facts.collapses
        return None if token is None else self.control_id(token)

    def control_id(self, token: str) -> int:
        """Id of a control token that a family writes itself."""
        if token not in self.controls:
            raise ModelError(
                f"the tokenizer lacks the control token {token!r} that its family writes"
            )
        return self.controls[token]

    def pieces(self, message: Message, part: int, sizes: Sequence[Size]) -> list[Piece]:
        """A part of a turn as the family writes it."""
        content = message.content[part]
        if isinstance(content, Box):
            before = message.content[part - 1] if part else None
            if self.family.facts.labels_once and _share_label(before, content):
                content = replace(content, label="")
            return self.family.render_box(content, sizes[content.image], self.policy)
        assert isinstance(content, Text)
        return [Piece(content.text)]


def _share_label(before: Part | None, box: Box) -> bool:
    """Whether a box directly follows another one of the same picture and label."""
    same_picture = isinstance(before, Box) and before.image == box.image
    return same_picture and isinstance(before, Box) and before.label == box.label


class Builder:
    """Collects tokens; a run of plain text is encoded as one, as the tokenizer would see it.

    A run is broken before an answer, even where the tokenizer would merge across: when the model is
    asked, the prompt ends there, and training must show it the same ids.
    """

    def __init__(self, rules: Rules, messages: Sequence[Message], sizes: tuple[Size, ...]) -> None:
        self._rules = rules
        self._messages = messages
        self._sizes = sizes
        self._ids: list[int] = []
        self._trained: list[bool] = []
        self._image: list[bool] = []
        self._run: list[str] = []
        self._run_trained = False
        self._in_answer = False
        self._next_image = 0
        self._image_policy = rules.family.row_policy(rules.policy, len(sizes))
        self._place = Place.FIRST

    def add(self, item: Item) -> None:
        """Append what an item of the template stands for."""
        if isinstance(item, Slot):
            self._slot(item)
        elif isinstance(item, Literal):
            # Within an answer too: what the template writes is not the answer. But what stands
            # between the asking and the answer has to be written by the model.
            self._text(item.text, trained=item.lead)
        elif isinstance(item, ImageSlot):
            self._image_tokens()
        elif isinstance(item, Opening):
            self._append(item.ids, trained=False)
            self._place = Place.FIRST
        else:
            ends = item.id == self._rules.end
            self._control(item.id, trained=item.lead or (self._in_answer and ends))
            self._in_answer = self._in_answer and not ends

    def finish(self) -> Tokens:
        """The row.

        Raises:
            ModelError: If an answer was not closed.
        """
        self._flush()
        if self._in_answer:
            raise ModelError(
                "the chat template does not close an answer with "
                f"{self._rules.family.facts.end_of_turn!r}; the model would never learn to stop"
            )
        ids = np.array(self._ids, dtype=np.int64)
        return Tokens(
            ids=ids,
            labels=np.where(np.array(self._trained, dtype=bool), ids, IGNORED),
            image_mask=np.array(self._image, dtype=bool),
            image_sizes=self._sizes,
        )

    def _slot(self, slot: Slot) -> None:
        message = self._messages[slot.message]
        self._in_answer = message.role == "assistant"
        pieces = self._rules.pieces(message, slot.part, self._sizes)
        for place, piece in enumerate(pieces):
            if piece.control:
                self._control(self._rules.control_id(piece.text), trained=self._in_answer)
                continue
            text = piece.text
            if slot.trim_start and place == 0:
                text = text.lstrip()
            if slot.trim_end and place == len(pieces) - 1:
                text = text.rstrip()
            self._text(text, trained=self._in_answer)
        if self._in_answer and slot.last and self._rules.adds_end:
            self._control(self._rules.end, trained=True)
            self._place = Place.WITHIN  # the template's own text runs on as if it were not there
            self._in_answer = False

    def _image_tokens(self) -> None:
        rules = self._rules
        for piece in rules.family.image_span(self._sizes[self._next_image], self._image_policy):
            if not piece.control:
                self._text(piece.text * piece.count, trained=False)
                continue
            self._flush()
            identifier = rules.control_id(piece.text)
            image = identifier == rules.family.image_token_id
            count = piece.count
            if rules.collapsing == identifier and self._ids and self._ids[-1] == identifier:
                count -= 1
            self._append([identifier] * count, trained=False, image=image)
        self._next_image += 1

    def _control(self, identifier: int, *, trained: bool) -> None:
        if identifier in self._rules.stripping.before and self._run:
            self._run[-1] = self._run[-1].rstrip()
        self._flush()
        self._append([identifier], trained=trained)

    def _text(self, text: str, *, trained: bool) -> None:
        if trained != self._run_trained:
            self._flush()
            self._run_trained = trained
        if not self._run and self._place is Place.AFTER_CONTROL:
            text = self._after_control(text)
        if text:
            self._run.append(text)

    def _after_control(self, text: str) -> str:
        """A text's beginning straight after a control token."""
        if self._ids[-1] in self._rules.stripping.after:
            text = text.lstrip()
        control = self._rules.family.parts.tokenizer.convert_ids_to_tokens(self._ids[-1])
        return self._rules.family.text_after(str(control), text)

    def _flush(self) -> None:
        text, self._run = "".join(self._run), []
        if text:
            ids = self._rules.text.ids(text, self._place)
            self._append(ids, trained=self._run_trained)
            self._place = Place.WITHIN

    def _append(self, ids: Sequence[int], *, trained: bool, image: bool = False) -> None:
        self._ids += ids
        self._trained += [trained] * len(ids)
        self._image += [image] * len(ids)
        self._place = Place.AFTER_CONTROL  # a run of text says otherwise itself


class KindBuilder(Builder):
    """Notes beside the tokens what they are."""

    def __init__(self, rules: Rules, messages: Sequence[Message], sizes: tuple[Size, ...]) -> None:
        super().__init__(rules, messages, sizes)
        self.kinds: list[TokenKind] = []
        self._writing: TokenKind = "template"
        self._begins: list[tuple[int, TokenKind]] = []  # character in the run, kind from there

    def add(self, item: Item) -> None:
        """Append what an item of the template stands for, and note what it is."""
        if isinstance(item, Slot):
            role = self._messages[item.message].role
            self._writing = "answer" if role == "assistant" else "question"
        else:
            self._writing = "template"
        super().add(item)

    def _text(self, text: str, *, trained: bool) -> None:
        if trained != self._run_trained:
            self._flush()
            self._run_trained = trained
        self._begins.append((sum(map(len, self._run)), self._writing))
        super()._text(text, trained=trained)

    def _flush(self) -> None:
        begins, self._begins = self._begins, []
        text = "".join(self._run)
        if text:
            for start in self._rules.text.offsets(text, self._place):
                self.kinds.append([kind for place, kind in begins if place <= start][-1])
        super()._flush()

    def _append(self, ids: Sequence[int], *, trained: bool, image: bool = False) -> None:
        super()._append(ids, trained=trained, image=image)
        if len(self.kinds) < len(self._ids):  # a run's own tokens were noted by ``_flush``
            self.kinds += ["image" if image else "control"] * len(ids)
