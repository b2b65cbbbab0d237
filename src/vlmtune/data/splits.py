"""Which rows are for validation.

Rows that share an image, by its bytes, are never divided: a model would be measured on pictures
that it was trained on. ``random`` takes whole groups; ``last`` takes the last rows (exactly those,
where images are distinct) and what shares an image with them. ``column:NAME`` is the user's own
division, taken as it is; images on both sides are counted and said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlmtune.data.build import draw
from vlmtune.data.records import FieldError, Record
from vlmtune.errors import UsageError

# What a split's column may say. A prepared dataset has two splits: a test row is never trained on.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "validation",
}


def split_of(record: Record, column: str) -> str:
    """The split that a row names in ``column``.

    Raises:
        FieldError: ``bad_split``: it names none that is known.
    """
    value = record.fields.get(column)
    split = SPLIT_NAMES.get(str(value).strip().lower())
    if split is None:
        raise FieldError(
            "bad_split",
            f"the column {column!r} holds {value!r}; expected one of {', '.join(SPLIT_NAMES)}",
            field=column,
            value=value,
        )
    return split


def rows_marked(splits: Sequence[str]) -> set[int]:
    """Positions of the rows marked as validation.

    Raises:
        UsageError: All are.
    """
    chosen = {row for row, split in enumerate(splits) if split == "validation"}
    if len(chosen) == len(splits):
        raise UsageError(f"all {len(splits)} rows are marked as validation; none is left to train")
    return chosen


class ImageGroups:
    """Rows that share an image, directly or through others, as rows are added one by one."""

    def __init__(self) -> None:
        self._first: dict[bytes, int] = {}  # image -> the first row that has it
        self._parent: list[int] = []

    def add(self, images: Iterable[bytes]) -> None:
        """Add the next row, given the hashes of its images."""
        row = len(self._parent)
        self._parent.append(row)
        for image in images:
            one, other = self.of(row), self.of(self._first.setdefault(image[:16], row))
            self._parent[max(one, other)] = min(one, other)

    def of(self, row: int) -> int:
        """The first row of the row's group."""
        while self._parent[row] != row:
            self._parent[row] = self._parent[self._parent[row]]
            row = self._parent[row]
        return row

    def astride(self, validation: set[int]) -> int:
        """Train rows whose group has a validation row."""
        groups = {self.of(row) for row in validation}
        return sum(
            row not in validation and self.of(row) in groups for row in range(len(self._parent))
        )


def rows_taken(
    amount: float, by: str, seed: int, ids: Sequence[str], groups: ImageGroups
) -> set[int]:
    """Positions of the rows taken for validation.

    Args:
        amount: A count, or a fraction below 1 (then at least one row).
        by: ``last``: the last rows and what shares an image with them, so that there may be more
            rows than asked for. ``random``: whole groups, by a hash of seed and the id of their
            first row, so that a row added elsewhere moves few others. A group that would make too
            many is passed over, so that there may be fewer rows than asked for, never more.
        seed: For ``random``.
        ids: Of all rows, in their order.
        groups: Which of them share images.

    Raises:
        UsageError: No row would be left to train on, or every group is too large.
    """
    count = max(1, round(amount * len(ids))) if 0 < amount < 1 else int(amount)
    if count >= len(ids):
        raise UsageError(
            f"--validation {amount} takes {count} of the {len(ids)} rows kept and leaves none to "
            "train on; take fewer"
        )
    if by == "last":
        return _last(count, ids, groups)
    members: dict[int, list[int]] = {}
    for row in range(len(ids)):
        members.setdefault(groups.of(row), []).append(row)
    taken: set[int] = set()
    for first in sorted(members, key=lambda row: draw(seed, f"split:{ids[row]}")):
        if len(taken) + len(members[first]) <= count:
            taken.update(members[first])
        if len(taken) == count:
            break
    if count and not taken:
        smallest = min(map(len, members.values()))
        raise UsageError(
            f"--validation {amount} takes {count} rows, but rows that share an image stay "
            f"together, and the fewest that do are {smallest}; take more, or --split-by last"
        )
    return taken


def _last(count: int, ids: Sequence[str], groups: ImageGroups) -> set[int]:
    wanted = {groups.of(row) for row in range(len(ids) - count, len(ids))}
    taken = {row for row in range(len(ids)) if groups.of(row) in wanted}
    if len(taken) == len(ids):
        raise UsageError(
            f"--validation: the last {count} rows share their images with all {len(ids)} rows, so "
            "that none is left to train on; divide them by a column: --split-by column:NAME"
        )
    return taken
