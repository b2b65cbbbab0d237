"""The model card: what a model hub shows, with the numbers and how sure they are."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlmtune.evaluation.markup import visible
from vlmtune.evaluation.report_content import ReportContent, cut_words, headline, ledger_words
from vlmtune.evaluation.report_words import (
    difference_words,
    estimate_words,
    facts,
    metric_words,
    total_words,
)
from vlmtune.files import write_text

TASK = "image-text-to-text"
_SPECIAL = re.compile(r"([\\`*_\[\]|#~])")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_model_card(path: Path, content: ReportContent) -> None:
    """Write the card as Markdown with the front matter that the Hugging Face hub reads."""
    write_text(path, model_card(content))


def model_card(content: ReportContent) -> str:
    """The card; the same content gives the same bytes."""
    written = yaml.safe_dump(_front_matter(content), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{written}---",
        f"# {plain(content.title)}",
        plain(headline(content)),
        _results(content),
        _table("Merge", content.merged),
        _use(content),
        _table("Training", {k: total_words(k, v) for k, v in content.totals.items()}),
        _table("Data", content.data),
        plain(ledger_words(content.ledger)[1]) if content.ledger else "",
        _table("Preprocessing contract", content.contract),
        _fenced("Recipe", content.recipe_yaml, "yaml"),
        _fenced("Reproduce", content.reproduce, "sh"),
        _table("Versions and hardware", content.environment),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", html.escape(visible(" ".join(text.split())), quote=False))


def _front_matter(content: ReportContent) -> dict[str, Any]:
    full = content.method == "full" or bool(content.merged)
    matter: dict[str, Any] = dict(content.license)
    # The hub refuses a card whose base_model is no hub id, and a path says more than it should.
    if _HUB_ID.fullmatch(content.base_model):
        matter["base_model"] = content.base_model
        matter["base_model_relation"] = "finetune" if full else "adapter"
    matter["library_name"] = "transformers" if full else "peft"
    matter["pipeline_tag"] = TASK
    matter["tags"] = ["vlmtune", "vision-language-model", visible(content.method)]
    return matter


def _results(content: ReportContent) -> str:
    if not content.metrics:
        return ""
    lines = [
        "## Results",
        "",
        "| metric | before | after | difference |",
        "| --- | --- | --- | --- |",
    ]
    for name in content.metrics:
        before, after = content.estimates(name)
        cells = (
            metric_words(name),
            estimate_words(before),
            estimate_words(after),
            difference_words(content.difference(name)),
        )
        lines.append(f"| {' | '.join(plain(cell) for cell in cells)} |")
    lines += ["", "Brackets are 95 % intervals; differences are paired over the same rows."]
    answered = content.answers.get("after")
    if answered is not None and answered.cut:
        lines += ["", plain(f"After training {cut_words(answered)}")]
    if content.merged:
        lines += ["", "Measured on what was trained, before it was merged into these weights."]
    return "\n".join(lines)


def _use(content: ReportContent) -> str:
    questions = {row.question for row in content.rows}
    # A prompt that all rows share belongs to the task; a single row's question is somebody's data.
    shared = questions.pop() if len(questions) == 1 and len(content.rows) > 1 else ""
    prompt = shlex.quote(visible(" ".join(shared.split())) or "your question")
    commands = [f"vlmtune predict . --image picture.png --prompt {prompt}"]
    if content.method != "full" and not content.merged:
        commands.append("vlmtune merge . --out merged    # plain weights, proven equal")
    commands.append("vlmtune serve .                 # OpenAI-compatible API")
    return _fenced("How to use", "\n".join(commands), "sh")


def _fenced(title: str, text: str, language: str) -> str:
    if not text:
        return ""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"## {title}\n\n{fence}{language}\n{visible(text.rstrip())}\n{fence}"


def _table(title: str, mapping: Mapping[str, Any]) -> str:
    if not mapping:
        return ""
    lines = [f"| {plain(key)} | {plain(value)} |" for key, value in facts(mapping)]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *lines])
