"""What ``vlmtune check`` shows on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from vlmtune.checking.check_page import WORDS, sentence
from vlmtune.checking.codes import code_of
from vlmtune.checking.findings import CheckResult, CodeCount, Finding
from vlmtune.evaluation.markup import visible

COLOURS = {"stop": "bold red", "note": "yellow", "accepted": "dim"}
CLASSES = 8
BAR = 24


def tables(name: str, result: CheckResult) -> Iterator[RenderableType]:
    """The result, part by part."""
    counts = result.counts()
    standing = "stop" if not result.ok else "note" if result.noted else "accepted"
    colour = "bold green" if standing == "accepted" else COLOURS[standing]
    yield Text.assemble((WORDS[standing], colour), f"  {visible(name)}: {result.rows:,} rows")
    if counts:
        yield Text()
        yield _findings(counts, result)
    yield Text(sentence(result, counts))
    if result.tokens:
        yield Text()
        yield _tokens(result)
    if result.classes:
        yield Text()
        yield _classes(result)


def _findings(counts: list[CodeCount], result: CheckResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("finding", ratio=5, overflow="fold")
    table.add_column("rows", justify="right")
    table.add_column("example", ratio=5, overflow="fold")
    table.add_column("what to do", ratio=5)
    first: dict[str, Finding] = {}
    for finding in result.findings:
        first.setdefault(finding.code, finding)
    for each in counts:
        known, example = code_of(each.code), first[each.code]
        limit = f"\n≤ {each.limit:,}" if each.limit else ""
        table.add_row(
            Text(each.standing, COLOURS[each.standing]),
            Text.assemble((each.code, "bold"), "\n", (known.meaning, "dim")),
            Text.assemble(f"{each.count:,}", (limit, "dim")),
            Text.assemble(visible(example.id), "\n", (visible(example.source), "dim")),
            Text(known.advice),
        )
    return table


def _tokens(result: CheckResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("tokens a row")
    names = ("p50", "p95", "max", "total")
    for name in names:
        table.add_column(name, justify="right")
    tokens = result.tokens
    parts = [("text", tokens["text"]), ("image", tokens["visual"]), ("trained", tokens["trained"])]
    for kind, values in [*parts, ("all", tokens)]:
        table.add_row(
            kind, *(f"{values[name]:,}" for name in names), style="bold" if kind == "all" else ""
        )
    return table


def _classes(result: CheckResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("class", overflow="fold", max_width=32)
    table.add_column("rows", justify="right")
    table.add_column("")
    most = max(result.classes.values())
    for label, count in list(result.classes.items())[:CLASSES]:
        bar = "█" * max(1, round(BAR * count / most))
        table.add_row(Text(visible(label)), f"{count:,}", Text(bar, "blue"))
    if len(result.classes) > CLASSES:
        table.add_row(Text(f"and {len(result.classes) - CLASSES:,} more", "dim"), "", "")
    return table
