"""Several runs beside each other: what is known of each, and what may be claimed between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.evaluation.answered import compared
from vlmtune.evaluation.intervals import Difference, Estimate
from vlmtune.evaluation.metrics import METRICS, find
from vlmtune.evaluation.run import Evaluation

# Where things lie and how often they are said does not make another run.
UNIMPORTANT = ("name", "description", "data.path", "data.sources", "training.log_steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLine:
    """What is known of a run; of a damaged one, what can be read.

    Attributes:
        name: What it is called in the list: different for each.
        path: Its folder.
        kind: ``finished``, ``running``, ``stopped`` or ``damaged``.
        state: How it stands, in words.
        step: The last step that was logged.
        base: Hub id or folder of what was trained.
        data: Name of the data.
        fingerprint: Of the data.
        method: ``tuning.method``.
        samples: Rows that were trained.
        seconds: Of the training.
        metric: The headline's.
        before: Metrics before training.
        after: Metrics after.
        difference: After compared with before in the headline's metric.
        options: The recipe's, by dotted name.
        steps: Rows of ``metrics.jsonl``.
        report: Its report, if there is one.
    """

    name: str
    path: str
    kind: str
    state: str
    step: int = 0
    base: str = ""
    data: str = ""
    fingerprint: str = ""
    method: str = ""
    samples: int = 0
    seconds: float = 0.0
    metric: str = ""
    before: Mapping[str, Estimate] = field(default_factory=dict)
    after: Mapping[str, Estimate] = field(default_factory=dict)
    difference: Difference | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    report: str = ""

    @property
    def samples_per_second(self) -> float:
        """Rows trained in a second."""
        return self.samples / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Runs that were measured on the same rows, compared with the best of them.

    Attributes:
        metric: In which they are compared.
        rows: How many rows.
        best: Name of the run with the best value.
        differences: Each further run minus the best, by name.
    """

    metric: str
    rows: int
    best: str
    differences: Mapping[str, Difference]


def metric_names(lines: Sequence[RunLine]) -> list[str]:
    """Metrics that some run has, those that are most often the headline first."""
    had = {name for line in lines for name in (*line.before, *line.after)}
    first = Counter(line.metric for line in lines)
    known = [name for name in METRICS if name in had]
    return sorted(known, key=lambda name: -first[name])


def best_names(lines: Sequence[RunLine], metric: str) -> set[str]:
    """Runs with the best value after training."""
    values = {line.name: line.after[metric].value for line in lines if metric in line.after}
    if len(values) < 2:
        return set()
    best = max(values.values()) if find(metric).higher_is_better else min(values.values())
    return {name for name, value in values.items() if value == best}


def differing(lines: Sequence[RunLine]) -> dict[str, list[tuple[Any, bool]]]:
    """Options in which runs differ: each run's value, and whether it is not the commonest."""
    known = [line for line in lines if line.options]
    names = dict.fromkeys(name for line in known for name in line.options)
    found = {}
    for name in names:
        if name in UNIMPORTANT or name.startswith("tracking."):
            continue
        values = [repr(line.options.get(name)) for line in known]
        counts = Counter(values)
        if len(counts) > 1:
            usual = counts.most_common(1)[0][0] if len(counts) < len(values) else None
            found[name] = [
                (
                    line.options.get(name),
                    bool(line.options) and repr(line.options.get(name)) != usual,
                )
                for line in lines
            ]
    return found


def rankings(lines: Sequence[RunLine], evaluations: Mapping[str, Evaluation]) -> list[Ranking]:
    """Compare runs with the best of those that answered the same rows.

    Args:
        lines: The runs.
        evaluations: What each answered after training, by the run's name.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for line in lines:
        evaluation = evaluations.get(line.name)
        if evaluation is not None and line.metric in evaluation.metrics:
            rows = tuple((row.id, row.references) for row in evaluation.predictions)
            groups.setdefault((line.metric, evaluation.normalise, rows), []).append(line.name)
    return [
        _ranked(metric, names, evaluations)
        for (metric, _, _), names in groups.items()
        if len(names) > 1
    ]


def _ranked(metric: str, names: Sequence[str], evaluations: Mapping[str, Evaluation]) -> Ranking:
    sign = 1 if find(metric).higher_is_better else -1
    best = max(names, key=lambda name: sign * evaluations[name].metrics[metric].value)
    others = {
        name: found[metric]
        for name in names
        if name != best
        and (found := compared(evaluations[best], evaluations[name], [metric])) is not None
    }
    return Ranking(
        metric=metric, rows=len(evaluations[best].predictions), best=best, differences=others
    )
