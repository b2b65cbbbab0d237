"""Progress on standard error: bars on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from vlmtune.cli.output import say
from vlmtune.verbs.observer import Observer

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from vlmtune.training.loop import StepReport
    from vlmtune.training.trainability import PartGradient

QUIET_SECONDS = 10.0
TABLE_WIDTH = 100


@contextmanager
def observing(log_steps: int = 10) -> Iterator[Observer]:
    """An observer for as long as a verb runs.

    Args:
        log_steps: Optimizer steps between two plain lines.
    """
    # Now: it draws a random number when it is imported, and a resumed run would draw it twice.
    from rich.console import Console

    if not sys.stderr.isatty():
        yield Lines(log_steps)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bars(progress)


class Bars(Observer):
    """One bar for each part of the job."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None, count="", note="")

    def stage(self, text: str) -> None:
        """Finish the bar under way and begin another."""
        self._progress.update(self._task, total=1, completed=1, count="")
        self._task = self._progress.add_task(text, total=None, count="", note="")

    def progress(self, done: int, total: int | None) -> None:
        """Move the bar."""
        count = f"{done:,}" if total is None else f"{done:,}/{total:,}"
        self._progress.update(self._task, completed=done, total=total, count=count)

    def step(self, report: StepReport) -> None:
        """Move the bar, with the step's figures beside it."""
        self.progress(report.step, report.steps)
        self._progress.update(self._task, note=step_line(report))

    def trainability(self, rows: Sequence[PartGradient]) -> None:
        """Print the table above the bars."""
        self._progress.console.print(trainability_table(rows))


class Lines(Observer):
    """Plain lines for logs."""

    def __init__(self, log_steps: int) -> None:
        self._log_steps = log_steps
        self._stage = "starting"
        self._said = monotonic()
        self._first: tuple[int, float] | None = None

    def stage(self, text: str) -> None:
        """Say what begins."""
        self._stage, self._said = text, monotonic()
        say(text)

    def progress(self, done: int, total: int | None) -> None:
        """Say how far it is, every ten seconds."""
        if monotonic() - self._said > QUIET_SECONDS:
            self._said = monotonic()
            say(f"{self._stage}: {done:,}" + ("" if total is None else f"/{total:,}"))

    def step(self, report: StepReport) -> None:
        """Say the first, every ``log_steps``-th and the last step."""
        if self._first is None:
            self._first = (report.step - 1, monotonic() - report.seconds)
        if report.step % self._log_steps and report.step not in (1, report.steps):
            return
        done, began = self._first
        pace = (monotonic() - began) / (report.step - done)
        left = clock(pace * (report.steps - report.step))
        say(f"step {report.step}/{report.steps}  {step_line(report)}  left {left}")
        if report.parts:
            say(f"  {parts_line(report)}")

    def trainability(self, rows: Sequence[PartGradient]) -> None:
        """Print the table, as wide as it needs to be."""
        from rich.console import Console

        Console(stderr=True, width=TABLE_WIDTH, color_system=None).print(trainability_table(rows))


def trainability_table(rows: Sequence[PartGradient]) -> Table:
    """Which parts train, and what gradient reached them."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("part")
    for name in ("parameters", "trainable", "gradient norm", "without gradient"):
        table.add_column(name, justify="right")
    for row in rows:
        seen = f"{row.gradient_norm:.3g}" if row.gradient_norm is not None else "frozen"
        if row.trainable and row.step is None:
            seen = "no image came"
        without = f"{row.without_gradient} tensors" if row.trainable else ""
        table.add_row(row.part, f"{row.parameters:,}", f"{row.trainable:,}", seen, without)
    return table


def step_line(report: StepReport) -> str:
    """Loss, learning rate, gradient norm and speed of a step, in one line."""
    line = (
        f"loss {report.loss:.4f}  lr {report.learning_rate:.2e}  grad {report.gradient_norm:.3f}  "
        f"{report.samples / report.seconds:.1f} samples/s  "
        f"{report.tokens / report.seconds:,.0f} tokens/s"
    )
    if report.probe_loss is not None:
        line += f"  probe {report.probe_loss:.4f}"
    for name, value in (report.probe_metrics or {}).items():
        line += f"  {name} {value:.3f}"
    return line if report.applied else line + "  (left out: not finite)"


def parts_line(report: StepReport) -> str:
    """What the step's time went to, in hundredths."""
    total = sum(report.parts.values()) or 1.0
    return "  ".join(f"{part} {100 * spent / total:.0f} %" for part, spent in report.parts.items())


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
