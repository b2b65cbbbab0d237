"""What a finished run says about itself: result, report, model card."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from vlmtune.data.conversation import Conversation
from vlmtune.data.mixture import open_recorded
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.answered import with_answers
from vlmtune.evaluation.model_card import write_model_card
from vlmtune.evaluation.report import write_report
from vlmtune.evaluation.report_content import ReportContent
from vlmtune.evaluation.run import Evaluation
from vlmtune.files import read_lines, write_json
from vlmtune.runs.best import best_step
from vlmtune.runs.checkpoints import checkpoints, step_of
from vlmtune.runs.folder import RunFolder


def write_summary(folder: RunFolder, slices: Sequence[str] = ()) -> ReportContent:
    """Write ``report.html`` and ``README.md`` from what lies in the run's folder.

    Everything is read back from the files, so that a report can be made again at any time.

    Args:
        folder: The run's.
        slices: Columns of the rows' ``meta`` to slice by, as ``meta.KEY``.

    Raises:
        UsageError: If no evaluated row has a column of ``slices``.
    """
    content = report_content(folder, slices)
    write_report(folder.report, content)
    write_model_card(folder.card, content)
    if content.differences is not None:
        found = {name: asdict(each) for name, each in content.differences.items()}
        write_json(folder.differences, found)
    return content


def report_content(folder: RunFolder, slices: Sequence[str] = ()) -> ReportContent:
    """Everything that the report of a run says.

    Args:
        folder: The run's.
        slices: Columns of the rows' ``meta`` to slice by, as ``meta.KEY``.

    Raises:
        UsageError: If no evaluated row has a column of ``slices``.
    """
    recipe_yaml = folder.recipe.read_text(encoding="utf-8")
    recipe = yaml.safe_load(recipe_yaml)
    data, contract = _read_json(folder.data), _read_json(folder.contract)
    before = Evaluation.read(folder.evaluation("before"))
    after = Evaluation.read(folder.evaluation("after"))
    trainability = _trainability(folder)
    content = ReportContent(
        title=recipe["name"],
        recipe_yaml=recipe_yaml,
        environment=_read_json(folder.environment),
        data={key: value for key, value in data.items() if key != "ledger"},
        steps=with_rates(folder.steps()),
        rates=_rates(recipe, trainability),
        clip=recipe.get("training", {}).get("clip", 0.0),
        trainability=trainability,
        history=list(_history(folder)),
        ledger=account(folder),
        totals=totals(folder),
        reproduce=reproducing(folder),
        contract=contract,
        base_model=contract["base"]["id"],  # of a folder the whole path, which no hub id looks like
        method=recipe["tuning"]["method"],
        primary=recipe["evaluation"]["metrics"][0],
    )
    rows = _validation(data) if before or after else ()
    return with_answers(content, before, after, rows, slices)


def reproducing(folder: RunFolder) -> str:
    """Command lines that run it again."""
    again = ["vlmtune", "reproduce", str(folder)]
    by_hand = ["vlmtune", "train", str(folder.recipe), "--run", f"{folder}-again"]
    return (
        "# again, in a new folder, with versions, data and base checked and the results compared\n"
        f"{shlex.join(again)}\n# the same training by hand\n{shlex.join(by_hand)}"
    )


def account(folder: RunFolder) -> dict[str, Any]:
    """Where every row that came in went; the numbers sum to ``in`` exactly.

    They do not where the ledger names more rows than the data has: the report then says so.
    """
    data = _read_json(folder.data)
    trained: set[str] = set()
    skipped: set[str] = set()
    left_out: dict[str, str] = {}
    for record in read_lines(folder.ledger):
        if record["event"] == "trained":
            trained.update(record["ids"])
        elif record["event"] == "skipped_step":
            skipped.update(record["ids"])
        elif record["event"] == "dropped":
            left_out[record["id"]] = record["code"]
    # What was trained before a changed plan left it out was trained all the same.
    skipped -= trained
    dropped = Counter(code for row, code in left_out.items() if row not in trained | skipped)
    train, validation = data["splits"]["train"], data["splits"]["validation"]
    quarantined: dict[str, int] = data["quarantined"]
    return {
        "in": train + validation + sum(quarantined.values()),
        "trained": len(trained),
        "skipped": len(skipped),  # only in steps that were not applied
        "not_reached": max(0, train - len(trained) - len(skipped) - dropped.total()),
        "validation": validation,
        "dropped": dict(dropped),
        "quarantined": quarantined,
    }


def totals(folder: RunFolder) -> dict[str, float]:
    """Steps, samples, tokens and seconds of the training itself."""
    steps = list(read_lines(folder.metrics))
    seconds = sum(record["seconds"] for record in steps)
    samples = sum(record["samples"] for record in steps)
    tokens = sum(record["tokens"] for record in steps)
    peak = max((record.get("peak_memory_bytes", 0) for record in steps), default=0)
    return {
        "steps": len(steps),
        "samples": samples,
        "tokens": tokens,
        "label_tokens": sum(record["labels"] for record in steps),
        "seconds": seconds,
        "samples_per_second": samples / seconds if seconds else 0.0,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "peak_memory_bytes": peak,
    }


def with_rates(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records of ``metrics.jsonl`` with samples and tokens a second."""
    records = []
    for record in steps:
        seconds = record["seconds"]
        rates = {
            "samples_per_second": record["samples"] / seconds if seconds else None,
            "tokens_per_second": record["tokens"] / seconds if seconds else None,
        }
        records.append({**record, **rates})
    return records


def _trainability(folder: RunFolder) -> list[dict[str, Any]]:
    """What the first gradients said of each part; of a resumed run, the last time."""
    parts: list[dict[str, Any]] = []
    for record in read_lines(folder.ledger):
        if record["event"] == "trainability":
            parts = record["parts"]
    return parts


def _rates(recipe: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Learning rate of each part that trains, as a multiple of the logged one."""
    own = recipe["tuning"].get("learning_rates") or {}
    highest = recipe.get("training", {}).get("learning_rate")
    trained = [part["part"] for part in parts if part["trainable"]]
    if not highest or not any(own.get(part) for part in trained):
        return {}
    return {part: (own.get(part) or highest) / highest for part in trained}


def _history(folder: RunFolder) -> Iterator[str]:
    """What happened to the run on its way, and which of its checkpoints was measured after."""
    for record in read_lines(folder.ledger):
        if record["event"] == "resumed":
            yield f"stopped and resumed after step {record['step']:,}"
        elif record["event"] == "stopped_early":
            yield f"ended early after step {record['step']:,}: nothing was gained any more"
        elif record["event"] == "changed":
            yield f"went on although something changed: {'; '.join(record['changes'])}"
    step, saved = best_step(folder), checkpoints(folder.checkpoints)
    if step is not None and saved and step != step_of(saved[-1]):
        yield f"the best checkpoint, that of step {step:,}, is what was evaluated and is used"


def _validation(data: Mapping[str, Any]) -> Sequence[Conversation]:
    """The validation rows, or none if the dataset has moved: a report is written all the same."""
    try:
        dataset = open_recorded(data)
    except VlmtuneError:  # a part of it has moved
        return ()
    # Where other data lies now, a row of the same id may show another picture.
    if dataset is None or dataset.fingerprint != data["fingerprint"]:
        return ()
    return dataset.split("validation")


def _read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
