"""Counters, gauges and histograms in Prometheus' text format."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Histogram:
    """How often values fell below each bound."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> list[str]:
        """In the text format; buckets count everything below them."""
        said, seen = [], 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            seen += count
            said.append(f'{name}_bucket{{le="{bound}"}} {seen}')
        return [*said, f"{name}_sum {self.total}", f"{name}_count {seen}"]


class Metrics:
    """What a server has done. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, dict[str, float]] = {}
        self._histograms: dict[str, Histogram] = {}
        self._gauges: dict[str, Callable[[], float]] = {}
        self._help: dict[str, tuple[str, str]] = {}
        self.counter("http_requests", "Requests by status.")
        self.counter("answers", "Answers by how they ended.")
        self.counter("prompt_tokens", "Tokens of the questions read.")
        self.counter("completion_tokens", "Tokens said.")
        self.histogram("batch_rows", "Answers spoken at once, a step.", ROWS)
        self.histogram("queue_seconds", "From asking to the first forward.", SECONDS)
        self.histogram("first_token_seconds", "From asking to having read the question.", SECONDS)
        self.histogram("answer_seconds", "From asking to the end of the last answer.", SECONDS)

    def counter(self, name: str, meaning: str) -> None:
        """Declare what only grows."""
        self._help[f"vlmtune_{name}_total"] = ("counter", meaning)
        self._counters[name] = {}

    def histogram(self, name: str, meaning: str, bounds: Sequence[float]) -> None:
        """Declare a distribution."""
        self._help[f"vlmtune_{name}"] = ("histogram", meaning)
        self._histograms[name] = Histogram(bounds)

    def gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Declare what is read when somebody asks."""
        self._help[f"vlmtune_{name}"] = ("gauge", meaning)
        self._gauges[name] = value

    def add(self, name: str, amount: float = 1, **labels: str | int) -> None:
        """Let a counter grow."""
        shown = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        with self._lock:
            counter = self._counters[name]
            counter[shown] = counter.get(shown, 0) + amount

    def observe(self, name: str, value: float) -> None:
        """Add a value to a distribution."""
        with self._lock:
            self._histograms[name].observe(value)

    def text(self) -> str:
        """Everything, as Prometheus reads it."""
        gauges = {name: value() for name, value in self._gauges.items()}
        with self._lock:
            lines = []
            for name, values in self._counters.items():
                full = f"vlmtune_{name}_total"
                lines += self._head(full)
                lines += [
                    f"{full}{{{labels}}} {value:g}" if labels else f"{full} {value:.15g}"
                    for labels, value in (values or {"": 0}).items()
                ]
            for name, histogram in self._histograms.items():
                lines += [*self._head(f"vlmtune_{name}"), *histogram.lines(f"vlmtune_{name}")]
            for name, value in gauges.items():
                lines += [*self._head(f"vlmtune_{name}"), f"vlmtune_{name} {value:g}"]
        return "\n".join(lines) + "\n"

    def _head(self, name: str) -> list[str]:
        kind, meaning = self._help[name]
        return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
