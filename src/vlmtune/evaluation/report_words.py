"""How a report, a model card and a list of runs say numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from vlmtune.evaluation.intervals import Difference, Estimate

SPELLED = {"anls": "ANLS", "bleu": "BLEU", "cer": "CER", "iou": "IoU", "f1": "F1"}
VERDICTS = {
    "better": "Better",
    "worse": "Worse",
    "none": "No difference can be claimed",
    "untested": "Not compared",
}
DASH = "–"


def figure(value: float) -> str:
    """A metric's value: three decimals, a real minus sign."""
    text = f"{value:.3f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def signed(value: float) -> str:
    """A difference's value: ``figure`` with its sign."""
    return f"{'+' if value >= 0.0005 else ''}{figure(value)}"


def estimate_words(estimate: Estimate | None) -> str:
    """``0.721 [0.660, 0.770]``, or a dash."""
    if estimate is None:
        return DASH
    return f"{figure(estimate.value)} [{figure(estimate.low)}, {figure(estimate.high)}]"


def difference_words(difference: Difference | None) -> str:
    """``+0.310 [0.250, 0.370]``, or a dash."""
    if difference is None:
        return DASH
    return f"{signed(difference.value)} [{figure(difference.low)}, {figure(difference.high)}]"


def probability_words(probability: float) -> str:
    """``99.2 %``; never a certainty, which no number of rows gives."""
    if probability > 0.999:
        return "over 99.9 %"
    if probability < 0.001:
        return "under 0.1 %"
    return f"{100 * probability:.1f} %"


def metric_words(name: str) -> str:
    """``edit_similarity`` as ``Edit similarity``, ``cer`` as ``CER``."""
    words = [SPELLED.get(word, word) for word in name.split("_")]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def counted(number: int, thing: str) -> str:
    """``1 row``, ``2,000 rows``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


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
    if name.endswith("seconds"):
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
