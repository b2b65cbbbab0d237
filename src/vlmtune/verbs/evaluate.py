"""``eval``: any model, adapter or run on any prepared dataset."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtune.data.conversation import Conversation
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import RefusedError, UsageError
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.report import write_report
from vlmtune.evaluation.report_content import ReportContent, ReportRow
from vlmtune.evaluation.run import PREDICTIONS, Evaluation, evaluate_rows
from vlmtune.models.load import LoadingConfig
from vlmtune.runs.folder import RunFolder, describe_environment
from vlmtune.runs.resolve import OpenModel, open_model, resolve
from vlmtune.verbs.observer import Observer

DEFAULT_METRICS = ("exact_match", "edit_similarity", "cer", "bleu")


def evaluate(  # noqa: PLR0913
    model: str | Path,
    data: str | Path,
    *,
    split: str = "validation",
    metrics: Sequence[str] = DEFAULT_METRICS,
    limit: int | None = None,
    out: str | Path | None = None,
    max_new_tokens: int | None = None,
    image: ImagePolicy | None = None,
    base: str | None = None,
    loading: LoadingConfig | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Answer and score a split.

    Args:
        model: Hub id, local model, run, checkpoint or adapter.
        data: A prepared dataset.
        split: Its split.
        metrics: Names of metrics; the first is the headline.
        limit: Only the first rows.
        out: Folder for predictions and report; ``evaluations/MODEL-SPLIT`` unless given, or the
            run's own ``evaluation/SPLIT`` where MODEL is a run.
        max_new_tokens: Longest answer; None: 1.5 times the longest label.
        image: Image policy of a plain model; what was trained keeps its contract.
        base: Where an adapter's base is now, if it moved.
        loading: Device, dtype, quantization.
        observer: Who is told how it goes.

    Returns:
        The keys of ``vlmtune eval --json``.
    """
    observer = observer or Observer()
    for name in metrics:
        find(name)
    dataset = PreparedDataset.open(data)
    rows: list[Conversation] = list(dataset.split(split)[:limit])
    if not rows:
        raise UsageError(f"--split: {data} has no {split} rows; prepare it with --validation 0.1")
    folder = Path(out).absolute() if out is not None else _default_out(model, split)
    if folder.exists() and any(folder.iterdir()):
        raise RefusedError(f"--out: {folder} is not empty; choose another folder with --out DIR")
    observer.stage("loading weights")
    opened = open_model(resolve(model, base=base), loading or LoadingConfig(), image=image)
    observer.stage("evaluating")
    evaluation = evaluate_rows(
        opened.model,
        opened.encoder,
        rows,
        metrics,
        max_new_tokens=max_new_tokens,
        progress=lambda count: observer.progress(count, len(rows)),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    evaluation.write(folder)
    content = _content(opened, dataset, split, rows, evaluation, metrics[0])
    write_report(folder / "report.html", content)
    opened.contract.write(folder)
    return {
        "metrics": evaluation.metrics_json(),
        "samples": len(rows),
        "predictions": str(folder / PREDICTIONS),
        "report": str(folder / "report.html"),
    }


def _default_out(model: str | Path, split: str) -> Path:
    """A new folder: within the run if MODEL is one, else under ``evaluations``."""
    run = RunFolder(model)
    if run.exists:
        first = run.evaluation(split)
    else:
        first = Path("evaluations") / f"{str(model).strip('/').replace('/', '-')}-{split}"
    candidate, number = first, 2
    while candidate.exists():
        candidate, number = first.with_name(f"{first.name}-{number}"), number + 1
    return candidate


def _content(
    opened: OpenModel,
    dataset: PreparedDataset,
    split: str,
    rows: Sequence[Conversation],
    evaluation: Evaluation,
    primary: str,
) -> ReportContent:
    answers = [
        ReportRow(
            id=prediction.id,
            question=prediction.question,
            truth=prediction.references,
            after=prediction.prediction,
            score_after=prediction.scores[primary],
            image=row.images[0].data if row.images else None,
        )
        for prediction, row in zip(evaluation.predictions, rows, strict=True)
    ]
    name = opened.resolved.name
    return ReportContent(
        title=f"{name} on {dataset.path.name} ({split})",
        environment=describe_environment(),
        data={"path": str(dataset.path), "split": split, "fingerprint": dataset.fingerprint},
        after=evaluation.metrics,
        rows=answers,
        contract=opened.contract.model_dump(mode="json"),
        base_model=opened.contract.base.id,
        reproduce=shlex.join(
            ["vlmtune", "eval", name, "--data", str(dataset.path), "--split", split]
        ),
        primary=primary,
    )
