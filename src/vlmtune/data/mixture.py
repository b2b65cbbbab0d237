"""Several prepared datasets as one, each with a weight.

An epoch has ``round(weight * rows)`` train rows of each source: all of them as often as the weight
is whole, and of what is left of it the rows whose hash of seed, source and id is smallest, in their
order and without repetition. The same rows make every epoch of a run; another seed draws others.
Validation rows are all sources' validation rows, whatever the weights.

Ids become ``SOURCE/ID``, where SOURCE is the name of the dataset's folder (``latex-2`` for a second
one of that name), and ``SOURCE@2/ID`` where a row comes a second time.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from vlmtune.data.build import draw
from vlmtune.data.conversation import Conversation
from vlmtune.data.dataset import PreparedDataset, Rows
from vlmtune.data.options import DataSource
from vlmtune.errors import UsageError


class Part(NamedTuple):
    """Rows of one source: what goes before their ids, and which rows (None: all)."""

    prefix: str
    rows: Rows
    positions: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """How many rows."""
        return len(self.rows) if self.positions is None else len(self.positions)


class MixedRows(Rows):
    """The rows of several sources, one after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self._ends: list[int] = []
        for part in self._parts:
            self._ends.append((self._ends[-1] if self._ends else 0) + part.length)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, position: int) -> Conversation:
        """The row at a position from 0 to the length."""
        number = bisect.bisect_right(self._ends, position)
        prefix, rows, positions = self._parts[number]
        inside = position - (self._ends[number - 1] if number else 0)
        row = rows.row(inside if positions is None else positions[inside])
        return replace(row, id=prefix + row.id)

    @cached_property
    def ids(self) -> list[str]:
        """All ids in order."""
        return [
            part.prefix + part.rows.ids[position]
            for part in self._parts
            for position in part.positions or range(part.length)
        ]


@dataclass(frozen=True)
class Mixture:
    """Several prepared datasets, opened as one.

    Attributes:
        sources: As in the recipe.
        datasets: The sources' datasets.
        seed: Draws the rows of fractional weights.
    """

    sources: tuple[DataSource, ...]
    datasets: tuple[PreparedDataset, ...]
    seed: int

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What the sources are called in ids: all different, none with a slash."""
        names: list[str] = []
        for dataset in self.datasets:
            folder = dataset.path.resolve().name.replace("@", "_") or "data"
            name, number = folder, 1
            while name in names:
                number += 1
                name = f"{folder}-{number}"
            names.append(name)
        return tuple(names)

    @property
    def fingerprint(self) -> str:
        """Over everything that decides which rows there are, in which order, by which ids."""
        parts = [
            [name, dataset.fingerprint, source.weight]
            for name, dataset, source in zip(self.names, self.datasets, self.sources, strict=True)
        ]
        return hashlib.sha256(json.dumps([self.seed, parts]).encode()).hexdigest()

    def split(self, name: str) -> MixedRows:
        """The rows of ``train`` or ``validation``.

        Raises:
            UsageError: No split of that name.
        """
        parts: list[Part] = []
        for prefix, dataset, source in zip(self.names, self.datasets, self.sources, strict=True):
            rows = dataset.split(name)
            weight = source.weight if name == "train" else 1.0
            parts += _weighted(prefix, rows, weight, self.seed)
        return MixedRows(parts)

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            ChangedError: Naming the file that is not what was written.
        """
        for dataset in self.datasets:
            dataset.verify()

    def facts(self) -> dict[str, Any]:
        """What a run records of its data; ``open_recorded`` opens it again."""
        quarantined: Counter[str] = Counter()
        for dataset in self.datasets:
            quarantined.update(dataset.quarantined())
        splits = {name: len(self.split(name)) for name in ("train", "validation")}
        return {
            "fingerprint": self.fingerprint,
            "source": " + ".join(self.names),
            "splits": splits,
            "quarantined": dict(sorted(quarantined.items())),
            "seed": self.seed,
            "sources": [
                {
                    "name": name,
                    "path": str(dataset.path.resolve()),
                    "weight": source.weight,
                    "fingerprint": dataset.fingerprint,
                    "train_rows": len(dataset.split("train")),
                    "rows_in_an_epoch": _share(source.weight, len(dataset.split("train"))),
                }
                for name, dataset, source in zip(
                    self.names, self.datasets, self.sources, strict=True
                )
            ],
        }


Dataset: TypeAlias = PreparedDataset | Mixture


def open_sources(sources: Sequence[DataSource], seed: int) -> Mixture:
    """Open several prepared datasets as one.

    Raises:
        UsageError: One is no prepared dataset, or no train row is left.
        ChangedError: One was changed or copied incompletely.
    """
    datasets = tuple(PreparedDataset.open(source.path) for source in sources)
    mixture = Mixture(tuple(sources), datasets, seed)
    if not len(mixture.split("train")):
        raise UsageError(
            "data.sources: with these weights an epoch has no train row; raise the weights"
        )
    return mixture


def open_recorded(facts: Mapping[str, Any]) -> Dataset | None:
    """The data of a run, from what it recorded; None: it has moved."""
    entries = facts.get("sources") or [{"path": facts["path"], "weight": 1.0}]
    if not all((Path(entry["path"]) / "dataset.json").exists() for entry in entries):
        return None
    if "sources" not in facts:
        return PreparedDataset.open(facts["path"])
    sources = [DataSource(path=entry["path"], weight=entry["weight"]) for entry in entries]
    return open_sources(sources, facts["seed"])


def _share(weight: float, rows: int) -> int:
    """Rows of a source in an epoch; halves are rounded up."""
    return math.floor(weight * rows + 0.5)


def _weighted(name: str, rows: Rows, weight: float, seed: int) -> list[Part]:
    """A source's rows, as often as its weight says."""
    if not len(rows):
        return []
    whole, rest = divmod(_share(weight, len(rows)), len(rows))
    prefixes = [f"{name}/"] + [f"{name}@{number}/" for number in range(2, whole + 2)]
    parts = [Part(prefix, rows) for prefix in prefixes[:whole]]
    if rest:
        order = sorted(
            range(len(rows)), key=lambda row: draw(seed, f"mixture:{name}:{rows.ids[row]}")
        )
        parts.append(Part(prefixes[whole], rows, tuple(sorted(order[:rest]))))
    return parts
