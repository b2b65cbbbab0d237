"""What a report says, before it is HTML or Markdown: the content, its numbers and its words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.evaluation.intervals import FEWEST_CHANGED, Difference, Estimate
from vlmtune.evaluation.metrics import find

ACRONYMS = frozenset({"anls", "bleu", "cer", "iou"})
VERDICTS = {
    "better": "Better",
    "worse": "Worse",
    "none": "No difference can be claimed",
    "untested": "Not compared",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRow:
    """One evaluated row.

    Attributes:
        id: Of the conversation.
        question: What the model was asked.
        truth: Every acceptable answer, the one trained on first.
        before: The answer before training; None if it was not asked for.
        after: The answer after training; None if it was not asked for.
        score_before: Of ``before``, in the report's primary metric.
        score_after: Of ``after``, in the report's primary metric.
        image: The encoded original of the first picture.
    """

    id: str
    question: str
    truth: Sequence[str]
    before: str | None = None
    after: str | None = None
    score_before: float | None = None
    score_after: float | None = None
    image: bytes | None = field(default=None, repr=False)

    @property
    def score(self) -> float | None:
        """What the row is ranked by: after training, or before where there is no after."""
        return self.score_before if self.score_after is None else self.score_after


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportContent:
    """Everything a report and a model card say.

    Attributes:
        title: Name of the run.
        recipe_yaml: The resolved recipe.
        environment: Versions, git commit, hardware; may be nested.
        data: Fingerprint and counts; may be nested.
        steps: Rows of ``metrics.jsonl``: ``step`` and any of ``loss``, ``probe_loss``,
            ``learning_rate``, ``gradient_norm``, ``samples_per_second``, ``tokens_per_second``.
        before: Metrics before training.
        after: Metrics after training.
        differences: After compared with before, on the same rows.
        rows: Every evaluated row.
        ledger: ``in``, the rows that came in, and where they went: each other key is a number of
            rows (``trained``) or numbers by code (``dropped``, ``quarantined``); they sum to it.
        totals: ``seconds``, ``samples``, ``tokens``, ``label_tokens``, ``steps``,
            ``samples_per_second``, ``peak_memory_bytes``.
        reproduce: Command lines that run it again.
        contract: The preprocessing contract.
        base_model: Hub id or path of the model that was trained.
        method: ``tuning.method``: ``full`` gives a transformers model, anything else an adapter.
        merged: Facts of the merge that made plain weights of it; empty if there was none.
        license: The base's ``license``, ``license_name`` and ``license_link``, where it goes along.
        primary: The metric of the headline and of the rows' scores; the first one if empty.
    """

    title: str
    recipe_yaml: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    before: Mapping[str, Estimate] | None = None
    after: Mapping[str, Estimate] | None = None
    differences: Mapping[str, Difference] | None = None
    rows: Sequence[ReportRow] = ()
    ledger: Mapping[str, Any] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)
    reproduce: str = ""
    contract: Mapping[str, Any] = field(default_factory=dict)
    base_model: str = ""
    method: str = "lora"
    merged: Mapping[str, Any] = field(default_factory=dict)
    license: Mapping[str, str] = field(default_factory=dict)
    primary: str = ""

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, the primary one first."""
        names = dict.fromkeys([*(self.after or {}), *(self.before or {})])
        return sorted(names, key=lambda name: name != self.primary)

    def estimates(self, name: str) -> tuple[Estimate | None, Estimate | None]:
        """The metric before and after."""
        return (self.before or {}).get(name), (self.after or {}).get(name)

    def difference(self, name: str) -> Difference | None:
        """The metric's difference, if it was tested."""
        return (self.differences or {}).get(name)

    @property
    def verdict(self) -> str:
        """A key of ``VERDICTS``, for the primary metric."""
        difference = self.difference(self.metrics[0]) if self.metrics else None
        return difference.verdict if difference else "untested"


def figure(value: float) -> str:
    """A metric's value: three decimals, a real minus sign."""
    text = f"{value:.3f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def estimate_words(estimate: Estimate | None) -> str:
    """``0.721 [0.660, 0.770]``, or a dash."""
    if estimate is None:
        return "–"
    return f"{figure(estimate.value)} [{figure(estimate.low)}, {figure(estimate.high)}]"


def difference_words(difference: Difference | None) -> str:
    """``+0.310 [0.250, 0.370]``, or a dash."""
    if difference is None:
        return "–"
    sign = "+" if difference.value >= 0.0005 else ""
    return f"{sign}{figure(difference.value)} [{figure(difference.low)}, {figure(difference.high)}]"


def metric_words(name: str) -> str:
    """``edit_similarity`` as ``Edit similarity``, ``cer`` as ``CER``."""
    words = [word.upper() if word in ACRONYMS else word for word in name.split("_")]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def headline(content: ReportContent) -> str:
    """What came out, in a few sentences that claim no more than was measured."""
    if not content.metrics:
        return "The model was not evaluated, so nothing can be said about its quality."
    name = content.metrics[0]
    before, after = content.estimates(name)
    words, sure = metric_words(name), f"{_rows_words(content)}; brackets are 95 % intervals."
    if after is None:
        return (
            f"{words} was {estimate_words(before)} before training. The model was not evaluated "
            f"after training, so no improvement can be claimed. {sure}"
        )
    if before is None:
        return (
            f"{words} is {estimate_words(after)} after training. The model was not evaluated "
            f"before training, so no improvement can be claimed. {sure}"
        )
    came = f"{words} {_verb(before, after)} {estimate_words(before)} to {estimate_words(after)}."
    return f"{came} {_verdict_words(content.difference(name), name)} {sure}"


def _verb(before: Estimate, after: Estimate) -> str:
    first, second = figure(before.value), figure(after.value)
    if first == second:
        return "stayed, from"
    return "rose from" if after.value > before.value else "fell from"


def _verdict_words(difference: Difference | None, name: str) -> str:
    if difference is None:
        return "The difference was not tested, so no improvement can be claimed."
    lower = "" if find(name).higher_is_better else " (lower is better)"
    stated = f"{VERDICTS[difference.verdict]}: {difference_words(difference)}{lower}."
    if difference.verdict == "none" and difference.changed < FEWEST_CHANGED:
        return f"{stated} {changed_words(difference)}"
    return stated


def changed_words(difference: Difference) -> str:
    """How many rows changed, where these are too few to claim anything."""
    rows = {0: "No row", 1: "Only 1 row"}.get(difference.changed, f"Only {difference.changed} rows")
    return f"{rows} scored differently; fewer than {FEWEST_CHANGED} support no claim."


def _rows_words(content: ReportContent) -> str:
    count = len(content.rows)
    return f"Measured on {count:,} row{'' if count == 1 else 's'}"


def ranked(content: ReportContent, most: int) -> tuple[list[ReportRow], list[ReportRow]]:
    """The worst rows, worst first, and the best, best first; at most ``most`` each, none twice."""
    scored = [row for row in content.rows if row.score is not None]
    rising = not content.metrics or find(content.metrics[0]).higher_is_better
    ordered = sorted(scored, key=lambda row: (row.score or 0.0) * (1 if rising else -1))
    worst = min(most, (len(ordered) + 1) // 2)
    best = min(most, len(ordered) - worst)
    return ordered[:worst], ordered[::-1][:best]


def moved(content: ReportContent) -> tuple[int, int, int] | None:
    """How many rows scored better, the same and worse after training; None without both scores."""
    gains = [
        row.score_after - row.score_before
        for row in content.rows
        if row.score_after is not None and row.score_before is not None
    ]
    if not gains or not content.metrics:
        return None
    up, down = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    same = len(gains) - up - down
    return (up, same, down) if find(content.metrics[0]).higher_is_better else (down, same, up)


def ledger_lines(ledger: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Where rows went: (kind, code or empty, rows)."""
    lines = []
    for kind, rows in ledger.items():
        if kind == "in":
            continue
        if isinstance(rows, Mapping):
            lines += [(kind, str(code), int(count)) for code, count in rows.items()]
        else:
            lines.append((kind, "", int(rows)))
    return lines


def ledger_words(ledger: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the ledger adds up, and the sum written out."""
    counts = [count for _, _, count in ledger_lines(ledger)]
    came, went = int(ledger.get("in", 0)), sum(counts)
    written = " + ".join(f"{count:,}" for count in counts) or "0"
    if came == went:
        return True, f"{came:,} = {written}. Every row that came in is accounted for."
    return False, (
        f"{came:,} rows came in, {written} = {went:,} are accounted for. "
        f"{abs(came - went):,} {'are missing' if came > went else 'are too many'}: "
        "do not trust this run before that is explained."
    )


def facts(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A nested mapping as lines: dotted key, value as text."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from facts(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", value
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{key}", f"{value:,}"
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False, default=str)


def total_words(name: str, value: float) -> str:
    """A total with its unit."""
    if not math.isfinite(value):
        return str(value)
    if name == "seconds":
        return duration(value)
    if name.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if name.endswith("_per_second"):
        return f"{value:,.2f} /s" if value < 100 else f"{value:,.0f} /s"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


def duration(seconds: float) -> str:
    """``1 h 03 min``, ``4 min 05 s`` or ``12.3 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
