"""``reproduce``: a run made again from what it stored, and compared with itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.mixture import Dataset, open_sources
from vlmtune.errors import ChangedError, RefusedError, UsageError
from vlmtune.evaluation.answered import compared
from vlmtune.evaluation.intervals import Difference
from vlmtune.evaluation.report_words import facts
from vlmtune.evaluation.run import Evaluation
from vlmtune.files import read_lines
from vlmtune.models.contract import Contract
from vlmtune.recipe import Recipe, load_recipe, recipe_from
from vlmtune.runs.checkpoints import MANIFEST, checkpoints
from vlmtune.runs.folder import RunFolder, describe_environment
from vlmtune.runs.resolve import fetch_base
from vlmtune.runs.state import damaged_files
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.run_facts import HARMLESS
from vlmtune.verbs.train import train

Outcome = Literal["identical", "equal", "indistinguishable", "different", "not measured"]

# These say where the same things are now; what they name is checked against what was recorded.
MAY_MOVE = (*HARMLESS, "model.base", "model.hub", "model.revision")
FIGURES = ("loss", "gradient_norm", "probe_loss")


def reproduce(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    resume: bool = False,
    allow_change: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Run it again in a new folder, and compare.

    Trackers are not told, unless ``tracking.to`` is among the overrides.

    Args:
        run: The run's folder.
        overrides: Where things are now, as ``data.path=DIR`` or ``model.base=DIR``, or what does
            not change the result.
        out: The new run's folder; ``RUN-again`` unless given.
        resume: Go on with a reproduction that was stopped.
        allow_change: Go on although data or base are not the same; the comparison says so.
        observer: Who is told how it goes.

    Returns:
        The keys of ``vlmtune reproduce --json``; nothing in the further processes of a distributed
        run.

    Raises:
        UsageError: If the folder holds no run, or an override would make it another one.
        RefusedError: If the run's files are damaged.
        ChangedError: If data or base differ.
    """
    first = RunFolder(run)
    if not first.exists:
        raise UsageError(f"RUN: {run} holds no run (recipe.yaml is missing)")
    damage = damaged_files(first)
    if damage:
        raise RefusedError(f"RUN: {run} is damaged ({damage}); nobody knows what it was")
    again = RunFolder(out) if out is not None else _free(first, resume)
    if again.path.resolve() == first.path.resolve():
        raise UsageError(f"--run: {again} is the run itself; choose another folder")
    observer = observer or Observer()
    recipe = stored_recipe(first, overrides)
    observer.stage("comparing with what was recorded")
    essential = list(_changed_inputs(first, recipe))
    if essential and not allow_change:
        raise ChangedError(
            f"{first} cannot be reproduced: {'; '.join(essential)}. Say where the same is now "
            "(data.path=DIR, model.base=DIR), or run it all the same with --allow-change"
        )
    differs = [*essential, *_changed_environment(first), *_detours(first)]
    for line in differs:
        observer.stage(f"differs: {line}")
    done = train(
        recipe, run_dir=again.path, resume=resume, allow_change=allow_change, observer=observer
    )
    return {**compare_runs(first, again), "differs": differs} if done else {}


def stored_recipe(run: RunFolder, overrides: Sequence[str] = ()) -> Recipe:
    """A run's recipe, with data and base where the run found them.

    Raises:
        UsageError: If an override would make it another run.
    """
    names = [override.partition("=")[0].strip() for override in overrides]
    for name in names:
        if name not in MAY_MOVE and not name.startswith("tracking."):
            raise UsageError(
                f"{name}: with another value it would be another run; `vlmtune train {run.recipe} "
                f"{name}=…` makes one. A reproduction may change {', '.join(MAY_MOVE)}"
            )
    values = load_recipe(run.recipe, overrides).model_dump(mode="json")
    recorded = json.loads(run.data.read_text(encoding="utf-8"))
    base = Contract.read(run.path).base
    if not {"data.path", "data.sources"} & set(names):
        entries = [{"path": e["path"], "weight": e["weight"]} for e in recorded.get("sources", ())]
        values["data"] |= {"path": None if entries else recorded["path"], "sources": entries}
    if "model.base" not in names:
        values["model"] |= {
            "base": base.id,
            "revision": base.revision or values["model"]["revision"],
        }
    if "tracking.to" not in names:
        values["tracking"]["to"] = []
    return recipe_from(values, str(run.recipe))


def compare_runs(first: RunFolder, again: RunFolder) -> dict[str, Any]:
    """What two runs of one recipe have in common."""
    old, new = (
        Evaluation.read(first.evaluation("after")),
        Evaluation.read(again.evaluation("after")),
    )
    changes = compared(old, new)
    same_weights = _weights(first) is not None and _weights(first) == _weights(again)
    steps = list(zip(first.steps(), again.steps(), strict=False))
    alike = sum(all(a.get(name) == b.get(name) for name in FIGURES) for a, b in steps)
    return {
        "run": str(again),
        "of": str(first),
        "outcome": _outcome(same_weights, changes),
        "same_weights": same_weights,
        "steps": {"identical": alike, "of": max(len(first.steps()), len(again.steps()))},
        "metrics": {} if changes is None else dict(_metrics(old, new, changes)),
        "report": str(again.report),
    }


def _outcome(same_weights: bool, changes: Mapping[str, Difference] | None) -> Outcome:
    if changes is None:
        return "identical" if same_weights else "not measured"
    if any(each.changed for each in changes.values()):
        claimed = any(each.verdict != "none" for each in changes.values())
        return "different" if claimed else "indistinguishable"
    return "identical" if same_weights else "equal"


def _metrics(
    old: Evaluation | None, new: Evaluation | None, changes: Mapping[str, Difference]
) -> Iterator[tuple[str, dict[str, Any]]]:
    assert old is not None
    assert new is not None
    for name, change in changes.items():
        yield (
            name,
            {
                "first": asdict(old.metrics[name]),
                "again": asdict(new.metrics[name]),
                "difference": {**asdict(change), "verdict": change.verdict},
            },
        )


def _weights(run: RunFolder) -> dict[str, str] | None:
    """Sha256 of the weights of the last checkpoint, by file and step."""
    saved = checkpoints(run.checkpoints)
    if not saved:
        return None
    files = json.loads((saved[-1] / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {
        f"{saved[-1].name}/{name}": entry["sha256"]
        for name, entry in files.items()
        if name.endswith(".safetensors")
    }


def _changed_inputs(run: RunFolder, recipe: Recipe) -> Iterator[str]:
    """Data or base that are not those of the run."""
    recorded = json.loads(run.data.read_text(encoding="utf-8"))
    found = _opened(recipe).fingerprint
    if found != recorded["fingerprint"]:
        yield f"data: the fingerprint was {recorded['fingerprint'][:12]} and is now {found[:12]}"
    base = Contract.read(run.path).base
    now = fetch_base(recipe.model.base, recipe.model.hub, recipe.model.revision).identity()
    if now.weights_sha256 != base.weights_sha256:
        yield f"base: {recipe.model.base} does not hold the weights that {base.id} had"


def _opened(recipe: Recipe) -> Dataset:
    if recipe.data.sources:
        return open_sources(recipe.data.sources, recipe.training.seed)
    assert recipe.data.path is not None
    return PreparedDataset.open(recipe.data.path)


def _changed_environment(run: RunFolder) -> Iterator[str]:
    """Versions and hardware that are not those of the run."""
    then = dict(facts(json.loads(run.environment.read_text(encoding="utf-8"))))
    now = dict(facts(describe_environment()))
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            yield f"{name}: was {then.get(name)}, is now {now.get(name)}"


def _detours(run: RunFolder) -> Iterator[str]:
    """Changes on the way, which the stored recipe does not tell."""
    for record in read_lines(run.ledger):
        if record["event"] == "changed":
            yield f"the run itself was changed on its way: {'; '.join(record['changes'])}"


def _free(first: RunFolder, resume: bool) -> RunFolder:
    """A folder beside the run that holds nothing; to resume, the last that holds something."""
    name, number = f"{first.path.name}-again", 1
    candidate, taken = first.path.with_name(name), None
    while candidate.exists():
        number += 1
        taken, candidate = candidate, first.path.with_name(f"{name}-{number}")
    return RunFolder(taken if resume and taken is not None else candidate)
