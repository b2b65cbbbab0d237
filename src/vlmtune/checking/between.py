"""What can be seen only between rows: copies, leaks, outliers, classes."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from vlmtune.checking.likeness import BYTES, candidates, look_alike
from vlmtune.checking.rows import Seen
from vlmtune.data.conversation import Conversation
from vlmtune.data.media import ImagePolicy, open_image
from vlmtune.errors import DataError

LONG_ANSWER = 16  # characters; the same longer answer is no coincidence, whatever the question
MOST_CLASSES = 1000
ROWS_A_CLASS = 10  # on average, or the answers are no classes
RARE = 10  # times rarer than the largest class
FEWEST_ROWS = 20  # to say anything about a distribution
DEVIATIONS, TIMES = 6.0, 4.0  # of an answer's length: robust deviations, and times the median
COMPARED = 2000  # pairs of pictures that are compared, at least; more with more rows


@dataclass(frozen=True, slots=True)
class Relation:
    """A finding about a row, in the light of another.

    Attributes:
        code: Its code.
        row: Number of the row, all splits counted through.
        message: In words; ``{other}`` is where the other row's name goes.
        other: Number of the other row, or None.
    """

    code: str
    row: int
    message: str
    other: int | None = None


class Crowd:
    """Some bytes of every row, and what they tell when all rows are in.

    Args:
        splits: Rows by split, in the order in which they will be added.
    """

    def __init__(self, splits: dict[str, int]) -> None:
        self._names = list(splits)
        self._ends = np.cumsum(list(splits.values()))
        self._pixels: dict[bytes, array[int]] = {}  # hash of all of a row's pictures -> rows
        self._question = array("Q")
        self._answer = array("Q")
        self._characters = array("L")
        self._hashes = bytearray()  # of the first picture of each row in ``_looked``
        self._aspects = array("d")
        self._looked = array("L")
        self._labels: list[Counter[str]] | None = [Counter() for _ in splits]
        self._first: dict[str, int] = {}  # first row of each label

    def split_of(self, row: int) -> int:
        """Number of a row's split."""
        return int(np.searchsorted(self._ends, row, side="right"))

    def add(self, seen: Seen) -> None:
        """Take in the next row."""
        row = len(self._question)
        self._question.append(seen.question)
        self._answer.append(seen.answer)
        self._characters.append(seen.characters)
        self._count_label(row, seen.label)
        if seen.pictures is None:
            return
        pixels = hashlib.blake2b(digest_size=16)
        for picture in seen.pictures:
            pixels.update(picture.pixels)
        if not seen.pictures:  # without pictures, rows are the same if their questions are
            pixels.update(seen.question.to_bytes(8, "big"))
        group = self._pixels.setdefault(pixels.digest(), array("L"))
        group.append(row)
        if seen.pictures and len(group) == 1:
            self._hashes += seen.pictures[0].hash
            self._aspects.append(seen.pictures[0].aspect)
            self._looked.append(row)

    def _count_label(self, row: int, label: str | None) -> None:
        if self._labels is None:
            return
        if label is None or len(self._first) > MOST_CLASSES:
            self._labels = None
            return
        self._first.setdefault(label, row)
        self._labels[self.split_of(row)][label] += 1

    def same(self) -> Iterator[Relation]:
        """Rows with the same pictures."""
        for group in self._pixels.values():
            if len(group) > 1:
                yield from self._same_in(group)

    def _same_in(self, group: Sequence[int]) -> Iterator[Relation]:
        copies: dict[tuple[int, int, int], int] = {}  # split, question, answer -> first row
        asked: dict[tuple[int, int], int] = {}  # split, question -> first row
        trained: dict[int | tuple[int, int], int] = {}  # answer, with its question if short
        first = group[0]
        for row in group:
            split, question, answer = self.split_of(row), self._question[row], self._answer[row]
            known: int | tuple[int, int] = answer
            if self._characters[row] <= LONG_ANSWER:
                known = (question, answer)
            if split == self.split_of(first):
                trained.setdefault(known, row)
            elif known in trained:
                yield Relation(
                    "leak", row, "picture and answer are those of {other}", trained[known]
                )
            else:
                yield Relation("image_in_both", row, "the picture is that of {other}", first)
            copy, question_of = (split, question, answer), (split, question)
            if copy in copies:
                yield Relation("duplicate", row, "all of it is as in {other}", copies[copy])
            elif question_of in asked:
                message = "picture and question are those of {other}, the answer is another"
                yield Relation("conflicting_answers", row, message, asked[question_of])
            copies.setdefault(copy, row)
            asked.setdefault(question_of, row)

    def alike(
        self, read: Callable[[int], Conversation], progress: Callable[[int, int], None]
    ) -> Iterator[Relation]:
        """Rows whose pictures are the same but for compression and scale.

        Args:
            read: Gives a row by its number.
            progress: Called with pairs compared and pairs in all.
        """
        hashes = np.frombuffer(bytes(self._hashes), dtype=np.uint8).reshape(-1, BYTES)
        aspects = np.frombuffer(self._aspects.tobytes(), dtype=np.float64)
        most = max(COMPARED, len(hashes))
        pairs = list(islice(candidates(hashes, aspects), most))
        told: set[int] = set()
        for number, (left, right) in enumerate(pairs):
            progress(number + 1, len(pairs))
            first, row = sorted((self._looked[left], self._looked[right]))
            if row in told or not _all_alike(read(first), read(row)):
                continue
            told.add(row)
            within = self.split_of(first) == self.split_of(row)
            agree = "the same" if self._answer[first] == self._answer[row] else "another"
            yield Relation(
                "near_duplicate" if within else "near_leak",
                row,
                f"the picture looks like that of {{other}}, the answer is {agree}",
                first,
            )

    def lengths(self) -> Iterator[Relation]:
        """Answers far longer or shorter than the rest."""
        kind = f"u{self._characters.itemsize}"
        characters = np.frombuffer(self._characters.tobytes(), dtype=kind)
        filled = np.flatnonzero(characters)
        if len(filled) < FEWEST_ROWS:
            return
        logs = np.log(characters[filled].astype(np.float64))
        middle = np.median(logs)
        spread = max(1.4826 * float(np.median(np.abs(logs - middle))), 0.1)
        limit = max(DEVIATIONS * spread, float(np.log(TIMES)))
        for row in filled[np.abs(logs - middle) > limit]:
            yield Relation(
                "answer_length",
                int(row),
                f"the answer has {characters[row]:,} characters, half of all have at least "
                f"{round(float(np.exp(middle))):,}",
            )

    def classes(self) -> Counter[str]:
        """Rows by answer in all splits, where the answers are a few classes; else nothing."""
        if self._labels is None:
            return Counter()
        total = sum(self._labels, Counter[str]())
        enough = total.total() >= FEWEST_ROWS and total.total() >= ROWS_A_CLASS * len(total)
        return total if enough else Counter()

    def balance(self) -> Iterator[Relation]:
        """Classes that are rare, or that training never sees."""
        classes = self.classes()
        if not classes or self._labels is None:
            return
        largest, most = classes.most_common(1)[0]
        if len(classes) == 1:
            message = f"all {most:,} answers are {largest!r}"
            yield Relation("one_answer", self._first[largest], message)
        for label, count in sorted(classes.items(), key=lambda item: (item[1], item[0])):
            if count * RARE <= most:
                yield Relation(
                    "class_imbalance",
                    self._first[label],
                    f"{label!r} has {count:,} rows, {largest!r} has {most:,}",
                )
            if self._labels[0] and not self._labels[0][label]:
                yield Relation(
                    "class_unseen",
                    self._first[label],
                    f"{label!r} has {count:,} rows in {self._names[-1]}, none in {self._names[0]}",
                )


def _all_alike(left: Conversation, right: Conversation) -> bool:
    """Whether all pictures of two rows look alike, one by one."""
    if len(left.images) != len(right.images):
        return False
    policy = ImagePolicy()
    try:
        return all(
            look_alike(open_image(one.data, policy), open_image(other.data, policy))
            for one, other in zip(left.images, right.images, strict=True)
        )
    except DataError:
        return False  # larger than the default allows: told by the row's own findings
