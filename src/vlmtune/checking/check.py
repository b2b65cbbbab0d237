"""``check``: everything about a dataset that can go wrong, before a GPU is busy."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, islice
from pathlib import Path

import numpy as np

from vlmtune.checking.between import Crowd, Relation
from vlmtune.checking.findings import CheckResult, Finding, Findings, Lengths, Limits
from vlmtune.checking.rows import Counts, RowCheck, Seen
from vlmtune.data.conversation import Conversation
from vlmtune.data.dataset import PreparedDataset
from vlmtune.models.encode import Encoder

AT_ONCE = 64  # rows in memory while they are looked at
MOST_THREADS = 16

Progress = Callable[[int, int], None]


class AllRows:
    """The rows of all splits of a dataset, counted through in the order of ``splits``."""

    def __init__(self, dataset: PreparedDataset) -> None:
        self.splits = dict(dataset.info.splits)
        self._names = list(self.splits)
        self._rows = [dataset.split(name) for name in self._names]
        self._ends = list(accumulate(self.splits.values()))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Conversation]:
        for rows in self._rows:
            yield from rows

    def __getitem__(self, number: int) -> Conversation:
        split, index = self._find(number)
        return self._rows[split][index]

    def _find(self, number: int) -> tuple[int, int]:
        split = bisect_right(self._ends, number)
        return split, number - (self._ends[split - 1] if split else 0)

    def place(self, number: int) -> str:
        """Split and number in it, as ``train:17``."""
        split, index = self._find(number)
        return f"{self._names[split]}:{index}"

    def at(self, place: str) -> Conversation:
        """The row of a place."""
        split, _, index = place.rpartition(":")
        return self._rows[self._names.index(split)][int(index)]


def source_of(row: Conversation, place: str) -> str:
    """Where a row came from, as ``table.csv:17``; its place where it does not say."""
    source = row.meta.get("source")
    return source if isinstance(source, str) and source else place


def check_dataset(
    path: str | Path,
    encoder: Encoder | None = None,
    *,
    max_length: int = 8192,
    limits: Limits | None = None,
    stage: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> CheckResult:
    """Look at every row of every split, and at the rows beside each other.

    Every picture is decoded. In memory are a few rows at a time, and about 200 bytes of each.

    Args:
        path: A prepared dataset.
        encoder: Of the model that will be trained, for token counts and what the family refuses.
        max_length: Rows with more tokens are found as ``too_long``.
        limits: Findings that are accepted, by code: a count, or (a float) a part of all rows.
        stage: Called with the name of each part of the work.
        progress: Called with what is done of it and what there is in all.

    Raises:
        UsageError: No prepared dataset.
        ChangedError: Its files are not what was written.
    """
    stage, progress = stage or (lambda _: None), progress or (lambda *_: None)
    dataset = PreparedDataset.open(path)
    stage("verifying files")
    dataset.verify()
    rows = AllRows(dataset)
    stage("checking rows")
    findings, lengths, crowd = _each_row(rows, RowCheck(encoder, max_length), progress)
    stage("comparing rows")
    for relations in (
        crowd.same(),
        crowd.alike(rows.__getitem__, progress),
        crowd.lengths(),
        crowd.balance(),
    ):
        _tell(relations, rows, findings)
    return CheckResult(
        rows=len(rows),
        findings=tuple(findings.kept),
        found=dict(findings.counts),
        limits=dict(limits or {}),
        lengths=lengths,
        classes=dict(crowd.classes().most_common()),
    )


def _each_row(rows: AllRows, look: RowCheck, progress: Progress) -> tuple[Findings, Lengths, Crowd]:
    findings, crowd, tokens = Findings(), Crowd(rows.splits), _Tokens()
    ids: set[int] = set()
    number, waiting = 0, iter(rows)
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        while together := list(islice(waiting, AT_ONCE)):
            for row, seen in zip(together, pool.map(look, together), strict=True):
                _note(findings, row, rows.place(number), seen, ids)
                crowd.add(seen)
                tokens.add(seen.counts)
                number += 1
            progress(number, len(rows))
    return findings, tokens.lengths(), crowd


def _note(findings: Findings, row: Conversation, place: str, seen: Seen, ids: set[int]) -> None:
    source = source_of(row, place)
    if (identity := hash(row.id)) in ids:
        message = f"the id {row.id!r} occurred before"
        findings.add(Finding("duplicate_id", row.id, source, message, place))
    ids.add(identity)
    for fault in seen.faults:
        findings.add(Finding(fault.code, row.id, source, fault.message, place))


def _tell(relations: Iterable[Relation], rows: AllRows, findings: Findings) -> None:
    for relation in relations:
        row, place = rows[relation.row], rows.place(relation.row)
        other, message = "", relation.message
        if relation.other is not None:
            other, twin = rows.place(relation.other), rows[relation.other]
            message = message.replace("{other}", f"{twin.id} ({other})")
        finding = Finding(relation.code, row.id, source_of(row, place), message, place, other)
        findings.add(finding)


class _Tokens:
    """Token counts of every row, twelve bytes each."""

    def __init__(self) -> None:
        self._text, self._visual, self._trained = array("I"), array("I"), array("I")

    def add(self, counts: Counts | None) -> None:
        if counts is not None:
            self._text.append(counts.text)
            self._visual.append(counts.visual)
            self._trained.append(counts.trained)

    def lengths(self) -> Lengths:
        text, visual, trained = (
            np.array(values, dtype=np.int64) for values in (self._text, self._visual, self._trained)
        )
        return Lengths(text, visual, trained)
