"""What ``check`` gives back: findings, how often each may occur, and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vlmtune.checking.codes import CODES, Severity, code_of
from vlmtune.data.quarantine import HINTS
from vlmtune.errors import UsageError

MOST_LISTED = 10_000  # findings of one code that are kept; all are counted

Standing = Literal["stop", "note", "accepted"]
Limits = Mapping[str, int | float]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found.

    Attributes:
        code: Stable name of what it is; see ``CODES``.
        id: The row's id.
        source: Where the row came from, as ``table.csv:17``; its place where that is unknown.
        message: In words.
        place: Split and number in it, as ``train:17``.
        other: Place of the row that it is like, or empty.
    """

    code: str
    id: str
    source: str
    message: str
    place: str
    other: str = ""

    @property
    def severity(self) -> Severity:
        """Whether it stops by itself."""
        return code_of(self.code).severity

    def to_json(self) -> dict[str, str]:
        """As ``vlmtune check --json`` lists it."""
        listed = {
            "code": self.code,
            "severity": self.severity,
            "id": self.id,
            "source": self.source,
            "message": self.message,
            "place": self.place,
        }
        return {**listed, "other": self.other} if self.other else listed


class Findings:
    """Collects findings: counts all, keeps the first ``MOST_LISTED`` of each code."""

    def __init__(self) -> None:
        self.kept: list[Finding] = []
        self.counts: Counter[str] = Counter()

    def add(self, finding: Finding) -> None:
        """Count a finding."""
        self.counts[finding.code] += 1
        if self.counts[finding.code] <= MOST_LISTED:
            self.kept.append(finding)


@dataclass(frozen=True, slots=True)
class CodeCount:
    """All findings of a code.

    Attributes:
        code: Its name.
        count: How many.
        limit: How many there may be; None for a note without a limit.
        standing: ``stop``; ``note``; or ``accepted``, where the user's own limit holds.
    """

    code: str
    count: int
    limit: int | None
    standing: Standing


@dataclass(frozen=True)
class Lengths:
    """Tokens of every row that could be encoded, in the order of the rows.

    Attributes:
        text: Tokens that are no image, shape ``(rows,)``.
        visual: Image tokens.
        trained: Tokens with a label.
    """

    text: np.ndarray
    visual: np.ndarray
    trained: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Text and image tokens."""
        return self.text + self.visual

    def summary(self) -> dict[str, Any]:
        """``p50 p95 max total`` of all tokens, and the same by kind; empty without rows."""
        if not len(self.text):
            return {}
        parts = {"text": self.text, "visual": self.visual, "trained": self.trained}
        by_kind = {name: _summary(values) for name, values in parts.items()}
        return {**_summary(self.total), **by_kind}


def _summary(values: np.ndarray) -> dict[str, int]:
    return {
        "p50": int(np.percentile(values, 50)),
        "p95": int(np.percentile(values, 95)),
        "max": int(values.max()),
        "total": int(values.sum()),
    }


@dataclass(frozen=True)
class CheckResult:
    """What ``check`` found.

    Attributes:
        rows: Rows looked at.
        findings: What was found, row by row, then between rows.
        found: How many of each code, listed or not.
        limits: Limits that the user set, by code.
        lengths: Tokens a row; without a model, of no row.
        classes: Rows by answer, commonest first, where the answers are a few classes.
    """

    rows: int
    findings: tuple[Finding, ...]
    found: Mapping[str, int]
    limits: Limits
    lengths: Lengths
    classes: Mapping[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether training may start."""
        return all(count.standing != "stop" for count in self.counts())

    @property
    def noted(self) -> bool:
        """Whether anything was found that the user did not accept beforehand."""
        return any(count.standing != "accepted" for count in self.counts())

    @property
    def tokens(self) -> dict[str, Any]:
        """Tokens of a row, ``p50 p95 max total`` and by kind; empty without a model."""
        return self.lengths.summary()

    def counts(self) -> list[CodeCount]:
        """Findings by code: what stops first, then the commonest."""
        order: Sequence[Standing] = ("stop", "note", "accepted")
        counts = [self._count(code, number) for code, number in self.found.items()]
        return sorted(counts, key=lambda each: (order.index(each.standing), -each.count, each.code))

    def _count(self, code: str, number: int) -> CodeCount:
        known = code_of(code)
        own = self.limits.get(code)
        if own is None and known.severity == "note":
            return CodeCount(code, number, None, "note")
        limit = rows_allowed(known.limit if own is None else own, self.rows)
        if number > limit:
            return CodeCount(code, number, limit, "stop")
        return CodeCount(code, number, limit, "note" if own is None else "accepted")

    def to_json(self) -> dict[str, Any]:
        """The keys of ``vlmtune check --json``."""
        return {
            "ok": self.ok,
            "rows": self.rows,
            "findings": [finding.to_json() for finding in self.findings],
            "tokens": self.tokens,
            "counts": {
                each.code: {"count": each.count, "limit": each.limit, "standing": each.standing}
                for each in self.counts()
            },
            "classes": dict(self.classes),
        }


def rows_allowed(limit: int | float, rows: int) -> int:
    """A limit as a number of findings; a float is a part of all rows."""
    return limit if isinstance(limit, int) else int(limit * rows + 1e-9)


def parse_limits(texts: Iterable[str]) -> dict[str, int | float]:
    """Limits as they are written: ``too_long=5``, ``near_duplicate=2%``, ``leak=0.01``.

    Raises:
        UsageError: An unknown code, or no number.
    """
    limits: dict[str, int | float] = {}
    for text in texts:
        code, equals, number = text.partition("=")
        if not equals:
            raise UsageError(f"--allow: found {text!r}, expected CODE=NUMBER, e.g. too_long=1%")
        if code not in CODES and code not in HINTS:
            raise UsageError(
                f"--allow: {code!r} is no code of check; the codes are {', '.join(CODES)}"
            )
        limits[code] = _limit(text, number)
    return limits


def _limit(text: str, number: str) -> int | float:
    try:
        if number.isascii() and number.isdigit():
            return int(number)
        share = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(
            f"--allow: found {text!r}, expected a number of findings (5) or a part of all rows "
            "(0.01 or 1%)"
        )
    return share
