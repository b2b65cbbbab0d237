"""What a report says, before it is HTML or Markdown: its content, and the sentences about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.data.conversation import Box
from vlmtune.evaluation.intervals import FEWEST_CHANGED, Difference, Estimate
from vlmtune.evaluation.metrics import METRICS, find
from vlmtune.evaluation.report_words import (
    VERDICTS,
    counted,
    difference_words,
    estimate_words,
    figure,
    metric_words,
    probability_words,
)

MOST_ROWS = 20  # worst, and as many best
MOST_FALLEN = 5  # of the rows that lost most in training
MOST_PICTURES = 4  # of one row


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
        cut_before: Whether ``before`` was cut at the limit of tokens.
        cut_after: Whether ``after`` was.
        true_boxes: Boxes of the row's own answer, in pixels of the upright picture.
        boxes_before: Boxes in ``before``.
        boxes_after: Boxes in ``after``.
        images: The encoded originals of its pictures, at most ``MOST_PICTURES``.
        pictures: How many pictures it has.
    """

    id: str
    question: str
    truth: Sequence[str]
    before: str | None = None
    after: str | None = None
    score_before: float | None = None
    score_after: float | None = None
    cut_before: bool = False
    cut_after: bool = False
    true_boxes: Sequence[Box] = ()
    boxes_before: Sequence[Box] = ()
    boxes_after: Sequence[Box] = ()
    images: Sequence[bytes] = field(default=(), repr=False)
    pictures: int = 0

    @property
    def score(self) -> float | None:
        """What the row is ranked by: after training, or before where there is no after."""
        return self.score_before if self.score_after is None else self.score_after

    @property
    def boxes(self) -> Sequence[Box]:
        """Boxes in the answer that the row is ranked by."""
        return self.boxes_before if self.after is None else self.boxes_after


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What is known of all answers of one evaluation, beside the metrics.

    Attributes:
        rows: How many there are.
        cut: How many were cut at the limit; None where that is not known.
        limit: Most new tokens of an answer; None where that is not known.
        tokens: Tokens of all answers; None where that is not known.
        remarks: What metrics say beside their values, a line each.
        confusion: Which class was taken for which, as ``macro_f1`` describes it; or empty.
    """

    rows: int
    cut: int | None = None
    limit: int | None = None
    tokens: int | None = None
    remarks: Sequence[str] = ()
    confusion: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The primary metric on a part of the rows.

    Attributes:
        name: Which part, in words.
        rows: How many.
        before: The metric before training.
        after: The metric after.
        difference: After compared with before.
    """

    name: str
    rows: int
    before: Estimate | None = None
    after: Estimate | None = None
    difference: Difference | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slicing:
    """All rows, cut into slices by one of their properties.

    Attributes:
        by: The property, in words.
        slices: Each row is in one of them.
        left_out: Rows that do not have the property.
    """

    by: str
    slices: Sequence[Slice]
    left_out: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportContent:
    """Everything a report and a model card say.

    Attributes:
        title: Name of the run.
        recipe_yaml: The resolved recipe.
        environment: Versions, git commit, hardware; may be nested.
        data: Fingerprint and counts; may be nested.
        steps: Rows of ``metrics.jsonl``: ``step`` and any of ``loss``, ``probe_loss``,
            ``learning_rate``, ``gradient_norm``, ``samples_per_second``, ``probe_metrics`` (values
            by metric).
        rates: Learning rate of each part that trains, as a multiple of the logged one; empty where
            all have the logged one.
        clip: Largest norm of a step's gradient; 0: not clipped.
        trainability: What the first gradients said of each part, as the ledger has it.
        history: What happened to the run on its way, a line each: resumed, changed.
        before: Metrics before training.
        after: Metrics after training.
        differences: After compared with before, on the same rows.
        answers: What else is known of the answers, by ``before`` and ``after``.
        slicings: The primary metric on parts of the rows.
        rows: Every evaluated row; pictures only of those in ``chosen``.
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
    rates: Mapping[str, float] = field(default_factory=dict)
    clip: float = 0.0
    trainability: Sequence[Mapping[str, Any]] = ()
    history: Sequence[str] = ()
    before: Mapping[str, Estimate] | None = None
    after: Mapping[str, Estimate] | None = None
    differences: Mapping[str, Difference] | None = None
    answers: Mapping[str, Answers] = field(default_factory=dict)
    slicings: Sequence[Slicing] = ()
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
        names = {*(self.after or {}), *(self.before or {})}
        known = [name for name in METRICS if name in names]
        return sorted(known, key=lambda name: name != self.primary)

    @property
    def alone(self) -> bool:
        """Whether one evaluation is all there is: it belongs to no run, with a before and after."""
        return self.before is None and not self.recipe_yaml

    @property
    def labels(self) -> dict[str, str]:
        """What was measured (``before``, ``after``), and what it is called."""
        if self.alone:
            return {"after": "Value"} if self.after is not None else {}
        both = {"before": self.before, "after": self.after}
        return {when: when.capitalize() for when, found in both.items() if found is not None}

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
    if content.alone:
        return f"{words} is {estimate_words(after)}. {sure}"
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
    chance = probability_words(difference.probability)
    return f"{stated} The probability that it is better after training is {chance}."


def changed_words(difference: Difference) -> str:
    """How many rows changed, where these are too few to claim anything."""
    rows = {0: "No row", 1: "Only 1 row"}.get(difference.changed, f"Only {difference.changed} rows")
    return f"{rows} scored differently; fewer than {FEWEST_CHANGED} support no claim."


def _rows_words(content: ReportContent) -> str:
    return f"Measured on {counted(len(content.rows), 'row')}"


def moved_words(content: ReportContent) -> str:
    """How many rows moved which way, or nothing where that is not known."""
    change = moved(content)
    if change is None:
        return ""
    better, same, worse = change
    return (
        f"Of {counted(sum(change), 'row')}, {better:,} scored better after training than before, "
        f"{same:,} the same, {worse:,} worse."
    )


def cut_words(answers: Answers) -> str:
    """How many answers were cut at the limit, and how long they are; nothing if not known."""
    if answers.cut is None:
        return ""
    limit = f" of {counted(answers.limit, 'token')}" if answers.limit else ""
    length = ""
    if answers.tokens is not None and answers.rows:
        length = f", {answers.tokens / answers.rows:,.0f} tokens long on average"
    if not answers.cut:
        return f"no answer was cut at the limit{limit}{length}."
    were = "was" if answers.cut == 1 else "were"
    return (
        f"{answers.cut:,} of {counted(answers.rows, 'answer')} "
        f"({100 * answers.cut / answers.rows:.0f} %) {were} cut at the limit{limit}{length}; where "
        "an answer should have gone on, set evaluation.max_new_tokens higher."
    )


def ranked(content: ReportContent, most: int) -> tuple[list[ReportRow], list[ReportRow]]:
    """The worst rows, worst first, and the best, best first; at most ``most`` each, none twice."""
    scored = [row for row in content.rows if row.score is not None]
    sign = _sign(content)
    ordered = sorted(scored, key=lambda row: (row.score or 0.0) * sign)
    worst = min(most, (len(ordered) + 1) // 2)
    best = min(most, len(ordered) - worst)
    return ordered[:worst], ordered[::-1][:best]


def fallen(content: ReportContent, most: int) -> list[ReportRow]:
    """The rows that lost most in training, the greatest loss first."""
    sign = _sign(content)
    losses = [(gain * sign, row) for row, gain in _gains(content) if gain * sign < 0]
    return [row for _, row in sorted(losses, key=lambda each: each[0])[:most]]


def chosen(content: ReportContent) -> dict[str, list[ReportRow]]:
    """The rows that a report shows, by why; none twice."""
    worst, best = ranked(content, MOST_ROWS)
    seen = {row.id for row in (*worst, *best)}
    lost = [row for row in fallen(content, len(content.rows)) if row.id not in seen]
    return {"worst": worst, "fallen": lost[:MOST_FALLEN], "best": best}


def moved(content: ReportContent) -> tuple[int, int, int] | None:
    """How many rows scored better, the same and worse after training; None without both scores."""
    gains = [gain * _sign(content) for _, gain in _gains(content)]
    if not gains:
        return None
    up, down = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return up, len(gains) - up - down, down


def _gains(content: ReportContent) -> list[tuple[ReportRow, float]]:
    return [
        (row, row.score_after - row.score_before)
        for row in content.rows
        if row.score_after is not None and row.score_before is not None
    ]


def _sign(content: ReportContent) -> int:
    """1 where a higher score is better, else -1."""
    return 1 if not content.metrics or find(content.metrics[0]).higher_is_better else -1


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
