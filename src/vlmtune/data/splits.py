"""Which rows are for validation."""

from __future__ import annotations

from collections.abc import Sequence

from vlmtune.data.build import draw
from vlmtune.data.sources import FieldError, Record
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


def rows_taken(amount: float, by: str, seed: int, ids: Sequence[str]) -> set[int]:
    """Positions of the rows taken for validation.

    Args:
        amount: A count, or a fraction below 1 (then at least one row).
        by: ``last``, or ``random``: by a hash of seed and id, so that a row added elsewhere moves
            few others.
        seed: For ``random``.
        ids: Of all rows, in their order.

    Raises:
        UsageError: No row would be left to train on.
    """
    count = max(1, round(amount * len(ids))) if 0 < amount < 1 else int(amount)
    if count >= len(ids):
        raise UsageError(
            f"--validation {amount} takes {count} of the {len(ids)} rows kept and leaves none to "
            "train on; take fewer"
        )
    if by == "random":
        order = sorted(range(len(ids)), key=lambda row: draw(seed, f"split:{ids[row]}"))
        return set(order[:count])
    return set(range(len(ids) - count, len(ids)))
