"""What a person sees while the job runs: a live display on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.measures import Measures
from pipeline.records import ShardCounts


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        shards_total: shards of the job.
        shards_skipped: done before this run.
        shards_done: done in this run.
        shards_failed: given up.
        counts: outcomes of the samples of shards done in this run.
        live_counts: outcomes in shards that are still in hand.
        measures: of all workers of this run, since each loaded its model.
        workers_ready: workers that have loaded their model.
        elapsed_s: seconds since the workers were asked for.
    """

    shards_total: int
    shards_skipped: int
    shards_done: int = 0
    shards_failed: int = 0
    counts: ShardCounts = field(default_factory=ShardCounts)
    live_counts: ShardCounts = field(default_factory=ShardCounts)
    measures: Measures = field(default_factory=Measures)
    workers_ready: int = 0
    elapsed_s: float = 0.0

    @property
    def shards_left(self) -> int:
        """Shards that are neither done nor given up."""
        return self.shards_total - self.shards_skipped - self.shards_done - self.shards_failed

    def as_line(self) -> str:
        """One line for a log: shards, samples, rate, errors and the time left."""
        counts = self.counts + self.live_counts
        rate = counts.samples_in / self.elapsed_s if self.elapsed_s > 0 else 0.0
        waiting = "" if self.workers_ready else "waiting for workers | "
        failed = f", {self.shards_failed} failed" if self.shards_failed else ""
        return (
            f"{waiting}shards {self.shards_skipped + self.shards_done}/{self.shards_total}{failed} | "
            f"samples {counts.samples_in:,} ({rate:,.1f}/s) | rows {counts.rows:,} | "
            f"failed samples {counts.failed:,}{_kinds(counts)} | left {self._time_left()}"
        )

    def _time_left(self) -> str:
        if not self.shards_done:
            return "?"
        return as_duration(self.elapsed_s / self.shards_done * self.shards_left)


def _kinds(counts: ShardCounts) -> str:
    if not counts.errors_by_kind:
        return ""
    largest = sorted(counts.errors_by_kind.items(), key=lambda item: -item[1])[:3]
    return " (" + ", ".join(f"{kind} {count}" for kind, count in largest) + ")"


def as_duration(seconds: float) -> str:
    """Seconds as ``1h02m``, ``3m20s`` or ``12s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


class Progress(Protocol):
    """Takes the state of the run and messages; decides itself when to show them."""

    def update(self, state: RunState) -> None:
        """Show where the run stands, perhaps later."""

    def say(self, message: str) -> None:
        """Show a message at once."""


class _TerminalProgress:
    def __init__(self, live: Live) -> None:
        self._live = live

    def update(self, state: RunState) -> None:
        self._live.update(Text(state.as_line()))

    def say(self, message: str) -> None:
        self._live.console.print(message, markup=False, highlight=False)


class _LogProgress:
    def __init__(self, console: Console, interval_s: float) -> None:
        self._console = console
        self._interval_s = interval_s
        self._last_shown_s = time.monotonic()

    def update(self, state: RunState) -> None:
        now_s = time.monotonic()
        if now_s - self._last_shown_s >= self._interval_s:
            self._last_shown_s = now_s
            self.say(state.as_line())

    def say(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def open_progress(console: Console, interval_s: float) -> Iterator[Progress]:
    """A live display where the console is a terminal, else one line every `interval_s` seconds."""
    if not console.is_terminal:
        yield _LogProgress(console, interval_s)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield _TerminalProgress(live)
