"""What is known of each run of a folder, read from its files; a damaged one is listed too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vlmtune.errors import UsageError
from vlmtune.evaluation.comparison import RunLine
from vlmtune.evaluation.intervals import Difference, Estimate
from vlmtune.evaluation.run import METRICS
from vlmtune.runs.folder import RunFolder
from vlmtune.runs.state import find_runs, state_of
from vlmtune.training.summary import totals, with_rates

T = TypeVar("T")
EMPTY: Mapping[str, Any] = {}


def list_runs(paths: Sequence[str | Path]) -> list[RunLine]:
    """Every run in some folders, those that began first before the others.

    Args:
        paths: Runs, or folders with runs in them.

    Raises:
        UsageError: A folder that is not there, or no run at all.
    """
    folders: dict[Path, RunFolder] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UsageError(f"DIR: {path} is no folder; give a run, or a folder with runs in it")
        for found in find_runs(path):
            folders.setdefault(found.resolve(), RunFolder(found))
    if not folders:
        named = ", ".join(map(str, paths))
        raise UsageError(
            f"DIR: there is no run in {named}; a run is what `vlmtune train` writes (runs/NAME)"
        )
    ordered = sorted(folders.values(), key=lambda run: (_began(run), str(run)))
    return [read_run(run, name) for run, name in zip(ordered, _names(ordered), strict=True)]


def read_run(run: RunFolder, name: str) -> RunLine:
    """What is known of a run; what cannot be read is left out."""
    state = state_of(run)
    recipe = _or(lambda: _recipe(run), EMPTY)
    data, contract = _or(lambda: _read(run.data), EMPTY), _or(lambda: _read(run.contract), EMPTY)
    figures = _or(lambda: totals(run), EMPTY)
    before, after = (_estimates(run, when) for when in ("before", "after"))
    metric = _metric(recipe, [*after, *before])
    return RunLine(
        name=name,
        path=str(run),
        kind=state.kind,
        state=state.words,
        step=state.step,
        base=_base(contract, recipe),
        data=_data(data, recipe),
        fingerprint=str(data.get("fingerprint", "")),
        method=str(_section(recipe, "tuning").get("method", "")),
        samples=int(figures.get("samples", 0)),
        seconds=float(figures.get("seconds", 0.0)),
        metric=metric,
        before=before,
        after=after,
        difference=_difference(run, metric, before, after),
        options=dict(_flat(recipe)),
        steps=_or(lambda: with_rates(run.steps()), ()),
        report=str(run.report) if run.report.is_file() else "",
    )


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """The last part of each path, and as much more as it takes to tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    depth = 1
    while len({each[-depth:] for each in parts}) < len(parts):
        depth += 1
    return ["/".join(each[-depth:]) for each in parts]


def _began(run: RunFolder) -> float:
    for file in (run.environment, run.recipe, run.path):
        if file.exists():
            return file.stat().st_mtime
    return 0.0


def _recipe(run: RunFolder) -> Mapping[str, Any]:
    found = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else EMPTY


def _or(read: Callable[[], T], otherwise: T) -> T:
    """What a damaged run still says."""
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return otherwise


def _read(path: Path) -> Mapping[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else EMPTY


def _estimates(run: RunFolder, when: str) -> Mapping[str, Estimate]:
    def read() -> Mapping[str, Estimate]:
        found = _read(run.evaluation(when) / METRICS)["metrics"]
        return {name: Estimate(**value) for name, value in found.items()}

    return _or(read, EMPTY)


def _difference(
    run: RunFolder, metric: str, before: Mapping[str, Estimate], after: Mapping[str, Estimate]
) -> Difference | None:
    """The stored comparison, if it is of these evaluations: a run may have been changed since."""
    found = _or(lambda: Difference(**_read(run.differences)[metric]), None)
    if found is None or metric not in before or metric not in after:
        return None
    same = abs(found.value - (after[metric].value - before[metric].value)) < 1e-9
    return found if same else None


def _metric(recipe: Mapping[str, Any], measured: Sequence[str]) -> str:
    names = _section(recipe, "evaluation").get("metrics") or measured
    return str(names[0]) if names else ""


def _base(contract: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    name = str(_section(contract, "base").get("id") or _section(recipe, "model").get("base") or "")
    return Path(name).name if Path(name).is_absolute() else name


def _data(data: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    if "sources" in data:
        return str(data.get("source", ""))
    return Path(str(data.get("path") or _section(recipe, "data").get("path") or "")).name


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
