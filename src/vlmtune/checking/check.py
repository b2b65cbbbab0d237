"""``check``: everything about a dataset that can go wrong, before a GPU is busy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.data.conversation import Conversation, Text, validate
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.media import ImagePolicy, open_image, read_header
from vlmtune.errors import DataError
from vlmtune.models.encode import Encoder

# These stop a run or spoil it; the others are worth knowing.
NOTES = frozenset({"transparent", "animated", "rotated", "control_token"})


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        code: Stable name of what it is.
        id: The row's id.
        source: Split and place, as ``train:17``.
        message: In words.
    """

    code: str
    id: str
    source: str
    message: str

    @property
    def serious(self) -> bool:
        """Whether training should not start with it."""
        return self.code not in NOTES


@dataclass(frozen=True)
class CheckResult:
    """What ``check`` found.

    Attributes:
        rows: Rows looked at.
        findings: Everything found, in the order of the rows.
        tokens: Tokens of a row, ``p50 p95 max total``; empty without a model.
    """

    rows: int
    findings: tuple[Finding, ...]
    tokens: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether training may start."""
        return not any(finding.serious for finding in self.findings)

    def counts(self) -> dict[str, int]:
        """Findings by code."""
        return dict(sorted(Counter(finding.code for finding in self.findings).items()))

    def to_json(self) -> dict[str, Any]:
        """The keys of ``vlmtune check --json``."""
        return {
            "ok": self.ok,
            "rows": self.rows,
            "findings": [asdict(finding) for finding in self.findings],
            "tokens": self.tokens,
        }


def check_dataset(
    path: str | Path,
    encoder: Encoder | None = None,
    *,
    max_length: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> CheckResult:
    """Look at every row of every split.

    Args:
        path: A prepared dataset.
        encoder: Of the model that will be trained, for token counts and what the family refuses.
        max_length: Rows with more tokens are found as ``too_long``.
        progress: Called with rows done and rows in all.
    """
    dataset = PreparedDataset.open(path)
    dataset.verify()
    total = sum(dataset.info.splits.values())
    findings: list[Finding] = []
    lengths: list[int] = []
    seen: set[str] = set()
    done = 0
    for split in dataset.info.splits:
        for number, row in enumerate(dataset.split(split)):
            source = f"{split}:{number}"
            if row.id in seen:
                findings.append(Finding("duplicate_id", row.id, source, "the id occurred before"))
            seen.add(row.id)
            for code, message in _faults(row, encoder, max_length, lengths):
                findings.append(Finding(code, row.id, source, message))
            done += 1
            if progress is not None:
                progress(done, total)
    return CheckResult(total, tuple(findings), _summary(lengths))


def _faults(
    row: Conversation, encoder: Encoder | None, max_length: int, lengths: list[int]
) -> Iterator[tuple[str, str]]:
    policy = encoder.contract.image if encoder else ImagePolicy()
    try:
        validate(row)
        for image in row.images:
            yield from _image_notes(image.data, policy)
        if encoder is None:
            return
        tokens = len(encoder.tokens(row))
    except DataError as error:
        yield error.code, str(error)
        return
    lengths.append(tokens)
    if tokens > max_length:
        yield "too_long", f"{tokens} tokens, at most {max_length} are trained (data.max_length)"
    yield from _control_tokens(row, encoder)


def _image_notes(data: bytes, policy: ImagePolicy) -> Iterator[tuple[str, str]]:
    header = read_header(data, policy)
    open_image(data, policy)
    if header.transparent:
        yield "transparent", f"transparency is composed on {policy.background}"
    if header.frames > 1:
        yield "animated", f"only the first of {header.frames} frames is seen"
    if header.orientation != 1:
        yield "rotated", f"EXIF orientation {header.orientation} is applied"


def _control_tokens(row: Conversation, encoder: Encoder) -> Iterator[tuple[str, str]]:
    for part in row.parts():
        if isinstance(part, Text):
            for token in encoder.control_tokens_in(part.text):
                yield "control_token", f"{token!r} stands in a text; it is encoded as plain text"


def _summary(lengths: list[int]) -> dict[str, int]:
    if not lengths:
        return {}
    array = np.array(lengths)
    return {
        "p50": int(np.percentile(array, 50)),
        "p95": int(np.percentile(array, 95)),
        "max": int(array.max()),
        "total": int(array.sum()),
    }
