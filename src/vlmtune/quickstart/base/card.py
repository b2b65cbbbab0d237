"""Put the figures of a pretraining into the base's card: ``python -m …base.card LOG … --hardware``.

The logs are those of the run and of what went on from it (``--start``), in their order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtune.quickstart.base.rows import TASKS

CARD = Path(__file__).with_name("MODEL_CARD.md")
WEIGHTS = Path(__file__).with_name("weights") / "model.safetensors"
MARKS = ("<!-- written by card.py -->", "<!-- until here -->")
MOST_ROWS = 16  # of the table


def read_logs(logs: Sequence[Path]) -> list[dict[str, Any]]:
    """The measurements of a training, in its order: what was undone by a resumption is left out."""
    records = [
        json.loads(line) for log in logs for line in log.read_text(encoding="utf-8").splitlines()
    ]
    kept: list[dict[str, Any]] = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"] and "exact" in record:
            kept.pop()
        if "exact" in record:
            kept.append(record)
    return kept


def figures(measured: Sequence[dict[str, Any]], hardware: str, weights: Path) -> str:
    """What the card says of a training.

    Args:
        measured: Records of ``read_logs``, at least one.
        hardware: The machine, in words.
        weights: The exported weights.
    """
    last, size = measured[-1], weights.stat().st_size
    step = max(1, -(-len(measured) // MOST_ROWS))
    shown = [*measured[step - 1 :: step]]
    if shown[-1] is not last:
        shown.append(last)
    lines = [
        f"{last['step']:,} steps, {last['rows']:,} pictures, {last['seconds'] / 3600:.2f} "
        f"core-hours of training on {hardware}.",
        "",
        f"`model.safetensors`: {size / 1e6:.1f} MB, sha256 "
        f"`{hashlib.sha256(weights.read_bytes()).hexdigest()}`.",
        "",
        "Share of held-out answers that greedy decoding writes exactly:",
        "",
        f"| step | pictures | minutes | {' | '.join(TASKS)} |",
        "| ---: " * (3 + len(TASKS)) + "|",
    ]
    for record in shown:
        exact = " | ".join(_percent(record["exact"].get(task)) for task in TASKS)
        minutes = record["seconds"] / 60
        lines.append(f"| {record['step']:,} | {record['rows']:,} | {minutes:.0f} | {exact} |")
    return "\n".join(lines)


def fill(card: str, text: str) -> str:
    """The card with ``text`` between its marks.

    Raises:
        ValueError: If it has no marks.
    """
    begin, end = MARKS
    before, _, rest = card.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the card has no place for figures; expected {begin} and {end} in it")
    return f"{before}{begin}\n{text}\n{end}{after}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", type=Path, nargs="+", help="log.jsonl of the run, then of its end")
    parser.add_argument("--hardware", required=True, help='as in "one core of an AMD EPYC"')
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--card", type=Path, default=CARD)
    options = parser.parse_args(arguments)
    text = figures(read_logs(options.logs), options.hardware, options.weights)
    card: Path = options.card
    card.write_text(fill(card.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
