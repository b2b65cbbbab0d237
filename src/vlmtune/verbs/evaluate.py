"""``eval``: models, adapters, runs and other engines' predictions on any prepared dataset."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from vlmtune.data.conversation import Conversation
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import MissingExtraError, RefusedError, UsageError
from vlmtune.evaluation.answered import with_answers
from vlmtune.evaluation.latex import Normalise
from vlmtune.evaluation.metrics import find
from vlmtune.evaluation.prediction_files import read_predictions
from vlmtune.evaluation.report import write_report
from vlmtune.evaluation.report_content import ReportContent
from vlmtune.evaluation.run import (
    PREDICTIONS,
    Evaluation,
    Prediction,
    check_metrics,
    differences,
    evaluate_rows,
    scored,
)
from vlmtune.models.contract import Contract
from vlmtune.models.load import LoadingConfig
from vlmtune.runs.folder import RunFolder, describe_environment
from vlmtune.runs.resolve import Resolved, open_model, resolve
from vlmtune.serving.vllm.process import VllmConfig
from vlmtune.verbs.looking import look_at_questions
from vlmtune.verbs.observer import Observer

DEFAULT_METRICS = ("exact_match", "edit_similarity", "cer", "bleu")


@dataclass(frozen=True)
class _Job:
    """What is asked of every model.

    Attributes:
        dataset: Where the rows come from.
        split: Of it.
        rows: The rows to answer.
        metrics: Names; the first is the headline.
        normalise: How texts are brought to one spelling.
        seed: Of the intervals' resampling.
        max_new_tokens: Longest answer, or None.
        image: Image policy of a plain model.
        loading: Device, dtype, quantization.
        vllm: The vLLM that answers, or None.
        observer: Who is told how it goes.
    """

    dataset: PreparedDataset
    split: str
    rows: Sequence[Conversation]
    metrics: Sequence[str]
    normalise: Normalise
    seed: int
    max_new_tokens: int | None
    image: ImagePolicy | None
    loading: LoadingConfig
    vllm: VllmConfig | None
    observer: Observer


@dataclass(frozen=True)
class _Candidate:
    """A model to ask, or predictions that are there already.

    Attributes:
        name: As the user wrote it.
        out: Where its evaluation goes.
        model: The model; None where there are predictions.
        predictions: What a file says, without scores.
    """

    name: str
    out: Path
    model: Resolved | None = None
    predictions: Sequence[Prediction] = ()


def evaluate(  # noqa: PLR0913
    model: str | Path | Sequence[str | Path],
    data: str | Path,
    *,
    predictions: str | Path | Sequence[str | Path] = (),
    split: str = "validation",
    metrics: Sequence[str] = DEFAULT_METRICS,
    normalise: str = "none",
    limit: int | None = None,
    out: str | Path | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    image: ImagePolicy | None = None,
    base: str | None = None,
    loading: LoadingConfig | None = None,
    vllm: VllmConfig | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Answer and score a split, with one model or several, which are then compared.

    Args:
        model: Hub id, local model, run, checkpoint or adapter; several in a list, or none.
        data: A prepared dataset.
        predictions: Files of predictions to score beside the models; see
            ``evaluation.prediction_files``.
        split: Its split.
        metrics: Names of metrics; the first is the headline.
        normalise: ``latex`` brings formulas to one spelling before texts are compared.
        limit: Only the first rows.
        out: Folder for predictions and report, or for a folder of each model where there are
            several; ``evaluations/MODEL-SPLIT`` unless given, or the run's own
            ``evaluation/SPLIT`` where MODEL is a run.
        max_new_tokens: Longest answer; None: 1.5 times the longest label.
        seed: Of the intervals' resampling.
        image: Image policy of a plain model; what was trained keeps its contract.
        base: Where an adapter's base is now, if it moved.
        loading: Device, dtype, quantization.
        vllm: Let this vLLM answer, in a process of its own; for merged models.
        observer: Who is told how it goes.

    Returns:
        The keys of ``vlmtune eval --json``: those of the first model, and with several ``models``,
        where each further one has its paired ``differences`` from the first.
    """
    models, files = _listed(model), _listed(predictions)
    if not models and not files:
        raise UsageError("MODEL: name a model, a run or an adapter, or give --predictions FILE")
    for name in metrics:
        find(name)
    if normalise not in get_args(Normalise):
        raise UsageError(f"--normalise: found {normalise!r}, expected none or latex")
    dataset = PreparedDataset.open(data)
    stored = dataset.split(split)
    rows: list[Conversation] = list(stored[:limit])
    if not rows:
        raise UsageError(f"--split: {data} has no {split} rows; prepare it with --validation 0.1")
    job = _Job(
        dataset=dataset,
        split=split,
        rows=rows,
        metrics=metrics,
        normalise=cast(Normalise, normalise),
        seed=seed,
        max_new_tokens=max_new_tokens,
        image=image,
        loading=loading or LoadingConfig(),
        vllm=vllm,
        observer=observer or Observer(),
    )
    folders = _folders([*models, *files], len(models), split, out)
    known = set(stored.ids)
    answered = [read_predictions(Path(file), rows, known, metrics) for file in files]
    candidates = [
        *(
            _Candidate(str(name), folder, model=resolve(name, base=base))
            for name, folder in zip(models, folders, strict=False)
        ),
        *(
            _Candidate(str(name), folder, predictions=found)
            for name, folder, found in zip(files, folders[len(models) :], answered, strict=True)
        ),
    ]
    return _compared(job, [(each, _evaluated(job, each)) for each in candidates])


def _listed(given: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [given] if isinstance(given, str | Path) else list(given)


def _folders(
    names: Sequence[str | Path], models: int, split: str, out: str | Path | None
) -> list[Path]:
    """A new folder for each, of which none holds anything."""
    if out is None:
        return list(
            _free(_default_out(name, split, place < models) for place, name in enumerate(names))
        )
    root = Path(out).absolute()
    if root.exists() and any(root.iterdir()):
        raise RefusedError(f"--out: {root} is not empty; choose another folder with --out DIR")
    if len(names) == 1:
        return [root]
    return list(_free(root / (Path(name).stem or "model") for name in names))


def _free(folders: Iterator[Path]) -> Iterator[Path]:
    """Each folder, with a number behind it if it is there or was given before."""
    taken: set[Path] = set()
    for first in folders:
        candidate, number = first, 2
        while candidate.exists() or candidate in taken:
            candidate, number = first.with_name(f"{first.name}-{number}"), number + 1
        taken.add(candidate)
        yield candidate


def _default_out(name: str | Path, split: str, is_model: bool) -> Path:
    """Within the run if it is one, else under ``evaluations``."""
    run = RunFolder(name)
    if is_model and run.exists:
        return run.evaluation(split)
    return Path("evaluations") / f"{str(name).strip('/').replace('/', '-')}-{split}"


def _evaluated(job: _Job, candidate: _Candidate) -> Evaluation:
    """Ask a model, or take the predictions; write folder and report."""
    contract: Contract | None = None
    if candidate.model is None:
        given = candidate.predictions
        check_metrics(
            job.metrics,
            [each.references for each in given],
            [each.truth for each in given],
            job.normalise,
        )
        job.observer.stage(f"scoring {candidate.name}")
        evaluation = scored(given, job.metrics, None, seed=job.seed, normalise=job.normalise)
    else:
        evaluation, contract = _asked(job, candidate.model)
    candidate.out.parent.mkdir(parents=True, exist_ok=True)
    evaluation.write(candidate.out)
    content = _content(job, candidate, evaluation, contract)
    write_report(candidate.out / "report.html", content)
    if contract is not None:
        contract.write(candidate.out)
    return evaluation


def _asked(job: _Job, model: Resolved) -> tuple[Evaluation, Contract]:
    if job.vllm is not None:
        return _asked_of_vllm(job, model, job.vllm)
    job.observer.stage("loading weights")
    opened = open_model(model, job.loading, image=job.image)
    job.observer.stage("evaluating")
    evaluation = evaluate_rows(
        opened.model,
        look_at_questions(opened.model, opened.encoder, job.rows),
        job.rows,
        job.metrics,
        max_new_tokens=job.max_new_tokens,
        seed=job.seed,
        normalise=job.normalise,
        progress=lambda count: job.observer.progress(count, len(job.rows)),
    )
    return evaluation, opened.contract


def _asked_of_vllm(job: _Job, model: Resolved, vllm: VllmConfig) -> tuple[Evaluation, Contract]:
    try:
        from vlmtune.serving.vllm.answers import Answers
        from vlmtune.serving.vllm.open import open_vllm
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "h11", "serve", "--engine vllm") from None
    job.observer.stage("starting vLLM")
    engine = open_vllm(model.name, vllm, image=job.image, loading=job.loading)
    try:
        engine.start()
        job.observer.stage("evaluating")
        encoder = engine.served.first.encoder
        evaluation = evaluate_rows(
            cast(Any, None),  # it is in another process
            encoder,
            job.rows,
            job.metrics,
            max_new_tokens=job.max_new_tokens,
            seed=job.seed,
            normalise=job.normalise,
            progress=lambda count: job.observer.progress(count, len(job.rows)),
            answer=Answers(engine),
        )
    finally:
        engine.stop()
    return evaluation, encoder.contract


def _compared(job: _Job, done: Sequence[tuple[_Candidate, Evaluation]]) -> dict[str, Any]:
    """The verb's result: the first model's keys, and all models where there are several."""
    results = [_result(candidate, evaluation) for candidate, evaluation in done]
    if len(done) == 1:
        return results[0]
    first = done[0][1].predictions
    models = [{"model": done[0][0].name, **results[0]}]
    for (candidate, evaluation), result in zip(done[1:], results[1:], strict=True):
        changes = differences(
            job.metrics, first, evaluation.predictions, seed=job.seed, normalise=job.normalise
        )
        written = {
            name: {**asdict(change), "verdict": change.verdict} for name, change in changes.items()
        }
        models.append({"model": candidate.name, **result, "differences": written})
    return {**results[0], "models": models}


def _result(candidate: _Candidate, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "metrics": evaluation.metrics_json(),
        "samples": len(evaluation.predictions),
        "predictions": str(candidate.out / PREDICTIONS),
        "report": str(candidate.out / "report.html"),
        "max_new_tokens": evaluation.max_new_tokens,
        "cut_at_limit": evaluation.cut_at_limit,
        "normalise": evaluation.normalise,
        "details": evaluation.details,
        "remarks": evaluation.remarks(),
    }


def _content(
    job: _Job, candidate: _Candidate, evaluation: Evaluation, contract: Contract | None
) -> ReportContent:
    dataset, name = job.dataset, candidate.name
    facts = {"path": str(dataset.path), "split": job.split, "fingerprint": dataset.fingerprint}
    content = ReportContent(
        title=f"{name} on {dataset.path.name} ({job.split})",
        environment=describe_environment(),
        data=facts,
        contract={} if contract is None else contract.model_dump(mode="json"),
        base_model="" if contract is None else contract.base.id,
        reproduce=_command(job, candidate),
        primary=job.metrics[0],
    )
    return with_answers(content, None, evaluation, job.rows)


def _command(job: _Job, candidate: _Candidate) -> str:
    """What evaluates the same again."""
    asked = ["--predictions", candidate.name] if candidate.model is None else [candidate.name]
    words = ["vlmtune", "eval", *asked, "--data", str(job.dataset.path), "--split", job.split]
    words += ["--metrics", ",".join(job.metrics), "--limit", str(len(job.rows))]
    if job.normalise != "none":
        words += ["--normalise", job.normalise]
    if job.vllm is not None and candidate.model is not None:
        words += ["--engine", "vllm"]
    return shlex.join(words)
