"""Pretrain the built-in base: ``python -m vlmtune.quickstart.base.pretrain OUT``.

Warm up, then a constant learning rate for as long as there is time; ``--decay-steps`` ends any
checkpoint well. The run is the same for the same seed, and continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import functional

from vlmtune.formulas.notation import Split
from vlmtune.quickstart.base.cache import LARGE, LAST, Shard, read_shard, write_shard
from vlmtune.quickstart.base.export import export
from vlmtune.quickstart.base.hints import NAME_LAYER, PLACE_LAYER, naming_loss, place_loss
from vlmtune.quickstart.base.model import (
    BaseSize,
    Batch,
    batch_logits,
    build_model,
    see,
)
from vlmtune.quickstart.base.optim import Masters
from vlmtune.quickstart.base.rows import TASKS, Collator, Row, Rows
from vlmtune.quickstart.base.tokenizer import build_tokenizer

# Rows of an optimizer step, from which step on: what is learnt first takes steps, not rows.
ROWS = ((1, 48), (3000, 64), (10_000, 128))
WARMUP = 50  # steps
EASY, FULL = 500, 3000  # steps: the shortest rows alone, and from when on all
SHARDS, STEPS_A_SHARD = 2, 80  # at the start, and until one more is taken up
LARGE_FROM, LARGE_SHARDS = 5863, (8, 22)  # from when on only large letters; shards then and at last
LAST_SHARDS = ((0, (12, 4)), (13_496, (20, 4)))  # while the rates fall: as the quickstart's; as all
# Share of the spans that ask for one shape by its name, from which step on: finding it by its name
# takes longer to learn than saying where it is.
ASKS = ((0, 0.0), (7400, 0.5), (9300, 0.8))
# How often each task comes, from which step on: where things are takes many rows to learn.
FINDS_FROM = 11_059
WEIGHTS = (
    (0, (0.6, 0.1, 0.05, 0.25)),
    (FINDS_FROM, (0.5, 0.05, 0.05, 0.4)),
    (11_557, (0.65, 0.05, 0.05, 0.25)),
)
LONGER_FROM = 12_296  # the longer one of two formulas: what is wrong is wrong in long ones
HELD_OUT = 512
# Share of the loss by which the eyes name what they see: with it single symbols are read after half
# as many steps. What stands in no place (the numbers of spans) is not named; shapes are named where
# they are as soon as that is told.
NAMING = 1.5
NAMED = {
    finds: torch.tensor(
        [name in ("formula", "line") or (name == "shapes" and not finds) for name in TASKS]
    )
    for finds in (False, True)
}
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides a run.

    Attributes:
        seed: Seed of weights and rows.
        shards: Shards of formulas at most, of small and of large letters each.
        rate: Learning rate of the hidden matrices.
        other_rate: Learning rate of everything else.
        decay_steps: Steps at the end in which the rates fall to zero; 0 for none.
        decay_start: The step after which they fall.
        weights_after: Steps that the weights had had before the optimizer's first.
    """

    seed: int = 1
    shards: int = 31
    rate: float = 0.01
    other_rate: float = 2e-3
    decay_steps: int = 0
    decay_start: int = 0
    weights_after: int = 0

    def factor(self, step: int) -> float:
        """Share of the learning rates that a step uses."""
        warm = min(1.0, (step - self.weights_after) / WARMUP)
        if self.decays(step):
            return warm * max(0.0, 1 - (step - self.decay_start) / self.decay_steps)
        return warm

    def decays(self, step: int) -> bool:
        """Whether the rates fall at a step."""
        return self.decay_steps > 0 and step > self.decay_start


def _at(schedule: Sequence[tuple[int, _Value]], step: int) -> _Value:
    """What holds at a step."""
    return [value for start, value in schedule if step >= start][-1]


def rows_of(step: int) -> int:
    """Rows of an optimizer step."""
    return _at(ROWS, step)


def shards_of(step: int, most: int, *, last: bool = False) -> Sequence[int]:
    """Numbers of the shards that a step's formulas come from.

    Args:
        step: The step.
        most: Shards of a kind at most.
        last: Whether the rates fall already.
    """
    if last:
        own, others = (min(most, count) for count in _at(LAST_SHARDS, step))
        return [*range(LAST, LAST + own), *range(LARGE, LARGE + others)]
    if step < LARGE_FROM:
        return range(min(most, SHARDS + step // STEPS_A_SHARD))
    first, final = LARGE_SHARDS
    count = min(most, final, first + (step - LARGE_FROM) // STEPS_A_SHARD)
    return range(LARGE, LARGE + count)


def _set(rows: Rows, step: int) -> None:
    """Let rows be those of a step."""
    rows.weights, rows.asks = _at(WEIGHTS, step), _at(ASKS, step)
    rows.finds, rows.longer = step >= FINDS_FROM, step >= LONGER_FROM


def ease_of(step: int) -> float:
    """1 while the rows are the shortest, 0 when all come."""
    return min(1.0, max(0.0, (FULL - step) / (FULL - EASY)))


class Run:
    """A pretraining run in a folder.

    Its seconds are those of its processor time: what it shares the cores with does not count.

    Args:
        out: Its folder: ``state.pt``, ``log.jsonl`` and ``base/``.
        cache: Folder of the rendered formulas.
        settings: What decides it.
    """

    def __init__(self, out: Path, cache: Path, settings: Settings) -> None:
        self.out, self.cache, self.settings = out, cache, settings
        out.mkdir(parents=True, exist_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build_tokenizer()
        self.model = build_model(BaseSize(), self.tokenizer, settings.seed).bfloat16()
        self.masters = Masters(self.model, settings.rate, settings.other_rate)
        self.rows = Rows(settings.seed, _at(WEIGHTS, 0))
        self.collator = Collator(self.tokenizer)
        self.step, self.seen, self.seconds = 0, 0, 0.0
        self._shown: list[tuple[np.ndarray, np.ndarray]] = []
        self._held_out: list[tuple[list[Row], list[Batch]]] = []

    def begin(self, base: Path, hours: float) -> None:
        """Go on from the weights of an exported base, with new optimizers.

        Args:
            base: Its folder.
            hours: Core-hours that it has had; its steps are in the settings.
        """
        from transformers import Qwen2VLForConditionalGeneration

        stored = Qwen2VLForConditionalGeneration.from_pretrained(base)
        self.model.load_state_dict(stored.state_dict())
        self.masters = Masters(self.model, self.settings.rate, self.settings.other_rate)
        self.step, self.seconds = self.settings.weights_after, 3600 * hours
        self.seen = sum(rows_of(step) for step in range(1, self.step + 1))

    def restore(self, path: Path) -> None:
        """Continue from a state."""
        state = torch.load(path, weights_only=True)
        self.masters.load(state["masters"])
        self.step, self.seen, self.seconds = state["step"], state["seen"], state["seconds"]

    def save(self) -> None:
        """Write the state; a kill in between leaves the old one."""
        state = {
            "step": self.step,
            "seen": self.seen,
            "seconds": self.seconds,
            "masters": self.masters.state(),
        }
        temporary = self.out / "state.part"
        torch.save(state, temporary)
        temporary.rename(self.out / "state.pt")

    def train_step(self) -> None:
        """One optimizer step."""
        started = time.process_time()
        self.step += 1
        shards = shards_of(self.step, self.settings.shards, last=self.settings.decays(self.step))
        self.rows.use(shards, self._shard)
        _set(self.rows, self.step)
        rows = self.rows.step(self.step, rows_of(self.step), ease_of(self.step))
        batches = self.collator.batches(rows)
        labels = sum(len(batch.targets) for batch in batches)
        for batch in batches:
            features = see(self.model, batch)
            scores = dict.fromkeys((NAME_LAYER, PLACE_LAYER), torch.empty(0))
            logits = batch_logits(self.model, batch, features, scores).float()
            losses = functional.cross_entropy(logits, batch.targets, reduction="none")
            named = NAMED[self.rows.finds][batch.tasks] & (batch.targets != self.collator.end)
            hints = naming_loss(self.model, features, batch)[named].sum()
            if batch.spots is not None:
                hints = hints + place_loss(self.model, features, batch, batch.spots, scores)
            ((losses.sum() + NAMING * hints) / labels).backward()
            self._shown.append((batch.tasks.numpy(), losses.detach().numpy()))
        self.masters.step(self.settings.factor(self.step))
        self.seen += len(rows)
        self.seconds += time.process_time() - started

    def _shard(self, number: int, split: Split = "pretraining") -> Shard:
        return read_shard(write_shard(self.cache, number, split=split, seed=self.settings.seed))

    def loss_by_task(self) -> dict[str, float]:
        """Mean loss of each task since the last call."""
        tasks, losses = (np.concatenate(part) for part in zip(*self._shown, strict=True))
        self._shown.clear()
        return {
            name: round(float(losses[tasks == task].mean()), 4)
            for task, name in enumerate(TASKS)
            if (tasks == task).any()
        }

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Share of the held-out answers that greedy decoding writes exactly, by task.

        It writes an answer exactly if and only if each token of it is the likeliest after the true
        ones before it, so no decoding is needed.
        """
        if not self._held_out:
            rows = self._held_out_rows()
            rows.sort(key=lambda row: row.page.size)
            chunks = [rows[at : at + 16] for at in range(0, len(rows), 16)]
            self._held_out = [(chunk, [self.collator.batch(chunk)]) for chunk in chunks]
        right: dict[str, list[bool]] = {name: [] for name in TASKS}
        for chunk, (batch,) in self._held_out:
            hit = batch_logits(self.model, batch).argmax(dim=-1) == batch.targets
            row_of = batch.predicts.nonzero()[:, 0]
            for index, row in enumerate(chunk):
                right[TASKS[row.task]].append(bool(hit[row_of == index].all()))
        return {name: round(sum(hits) / len(hits), 4) for name, hits in right.items() if hits}

    def _held_out_rows(self) -> list[Row]:
        rows = Rows(self.settings.seed + 1, _at(WEIGHTS, self.step))
        _set(rows, self.step)
        number = LARGE if self.step >= LARGE_FROM else 0
        if self.settings.decay_steps:
            number = LAST
        rows.use(range(number, number + 1), lambda number: self._shard(number, "held_out"))
        return rows.step(0, HELD_OUT, 0.0)


def train(run: Run, until: Callable[[Run], bool], every: float, logs: int = 100) -> None:
    """Train until told to stop; log, measure and save every so many seconds.

    Args:
        run: The run.
        until: Whether it is enough.
        every: Seconds between measurements, each with a checkpoint.
        logs: Steps between two lines of the log.
    """
    saved = time.monotonic()
    while not until(run):
        run.train_step()
        if run.step % logs == 0:
            _log(run, {"loss": run.loss_by_task()})
        if time.monotonic() - saved > every:
            run.save()
            _log(run, {"exact": run.measure()})
            export(run.model, run.tokenizer, run.out / "base")
            saved = time.monotonic()
    run.save()
    _log(run, {"exact": run.measure()})
    export(run.model, run.tokenizer, run.out / "base")


def _log(run: Run, record: dict[str, Any]) -> None:
    rate = run.settings.factor(run.step)
    line = {"step": run.step, "rows": run.seen, "seconds": round(run.seconds), "rate": rate}
    with (run.out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, **record}) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cache", type=Path, help="rendered formulas (default: OUT/cache)")
    parser.add_argument("--resume", action="store_true", help="continue OUT/state.pt if there")
    parser.add_argument("--start", type=Path, help="begin with another run's state.pt, or base/")
    parser.add_argument("--after", type=int, help="steps that --start base/ has had")
    parser.add_argument("--hours", type=float, help="core-hours that --start base/ has had")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after this step")
    parser.add_argument("--decay-steps", type=int, default=0, help="end with so many, then stop")
    parser.add_argument("--minutes", type=float, default=5, help="between checkpoints")
    for name in ("seed", "shards"):
        parser.add_argument(f"--{name}", type=int, default=asdict(Settings())[name])
    for name in ("rate", "other_rate"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=float, default=asdict(Settings())[name])
    options = parser.parse_args(arguments)
    state = options.out / "state.pt"
    source = state if options.resume and state.exists() else options.start
    exported = options.start is not None and options.start.is_dir()
    if exported != (options.after is not None) or exported != (options.hours is not None):
        parser.error("--after and --hours go with --start base/, whose weights do not tell them")
    settings = Settings(
        seed=options.seed,
        shards=options.shards,
        rate=options.rate,
        other_rate=options.other_rate,
        weights_after=options.after or 0,
    )
    run = Run(options.out, options.cache or options.out / "cache", settings)
    if source is not None and source.is_dir():
        run.begin(source, options.hours)
    elif source is not None:
        run.restore(source)
    last = options.steps
    if options.decay_steps:
        start = _decay_start(options.out, run.step)
        last = min(last, start + options.decay_steps)
        run.settings = Settings(
            **{**asdict(settings), "decay_steps": options.decay_steps, "decay_start": start}
        )
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopped.append(received))
    train(run, lambda run: bool(stopped) or run.step >= last, 60 * options.minutes)


def _decay_start(out: Path, step: int) -> int:
    """The step at which this run's decay began, kept across resumptions."""
    path = out / "decay_start"
    if not path.exists():
        path.write_text(str(step), encoding="utf-8")
    return int(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
