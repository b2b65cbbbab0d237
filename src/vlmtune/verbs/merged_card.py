"""The model card of merged weights: their run's figures, and the proof of the merge."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from vlmtune.evaluation.model_card import write_model_card
from vlmtune.evaluation.report_content import ReportContent
from vlmtune.runs.folder import RunFolder
from vlmtune.runs.resolve import Resolved
from vlmtune.training.summary import report_content

CARD = "README.md"
LICENCE = ("license", "license_name", "license_link")


def write_merged_card(
    folder: Path, resolved: Resolved, name: str, proof: Mapping[str, Any]
) -> None:
    """Write ``README.md`` into a merged model's folder, before it is published.

    A run's evaluation is of the checkpoint that stands for it, which is what a run merges; a
    checkpoint or an adapter given by itself has no figures. The card names no place on this
    machine: it is what a hub shows.

    Args:
        folder: The folder that is written.
        resolved: What was merged.
        name: What the model is called if no run says so.
        proof: What the merge found, for people to read.
    """
    run = RunFolder(resolved.name)
    content = report_content(run) if run.exists else ReportContent(title=name)
    assert resolved.contract is not None
    contract = resolved.contract.model_dump(mode="json")
    content = replace(
        content,
        base_model=contract["base"]["id"],
        contract=placeless(contract),
        data=placeless(dict(content.data)),
        recipe_yaml=_recipe(content.recipe_yaml),
        reproduce=_commands(content.reproduce),
        license=_licence(resolved.base.folder / CARD),
        merged=proof,
    )
    write_model_card(folder / CARD, content)


def placeless(value: Any) -> Any:
    """The value with every absolute path in it shortened to its last part."""
    if isinstance(value, Mapping):
        return {key: placeless(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [placeless(item) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


def _recipe(text: str) -> str:
    if not text:
        return ""
    return yaml.safe_dump(placeless(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)


def _commands(text: str) -> str:
    """Command lines without places on this machine; comments stay."""
    return "\n".join(
        line if line.startswith("#") else shlex.join(placeless(shlex.split(line)))
        for line in text.splitlines()
    )


def _licence(card: Path) -> dict[str, str]:
    """The base's licence, as its own card states it: it goes with the weights."""
    if not card.is_file():
        return {}
    head, fence, _ = card.read_text(encoding="utf-8", errors="replace").partition("\n---")
    try:
        matter = yaml.safe_load(head.removeprefix("---")) if fence else None
    except yaml.YAMLError:
        return {}
    if not isinstance(matter, dict):
        return {}
    return {key: matter[key] for key in LICENCE if isinstance(matter.get(key), str)}
