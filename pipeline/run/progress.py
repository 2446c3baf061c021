"""Progress of a run: a live display on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.console import PrintableConsole
from pipeline.output.counts import SHOWN_KINDS, ShardCounts
from pipeline.output.measures import Measures, pace_text
from pipeline.output.runs import RunState, workers_text
from pipeline.text import as_duration, printable

logger = logging.getLogger(__name__)

RECENT_S = 60.0


@dataclass(frozen=True)
class Pace:
    """Speed of a run.

    Attributes:
        samples_per_s: samples annotated, without prompts or failed, per second.
        measures: of all workers, in the time over which the pace is measured.
    """

    samples_per_s: float
    measures: Measures


class RecentPace:
    """Measure the pace of the last minute from successive states."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, Measures]] = deque([(0.0, 0, Measures())])

    def update(self, state: RunState) -> Pace:
        """Add the newest state.

        Returns:
            The pace since the oldest state that is not older than RECENT_S.
        """
        samples = state.counts_so_far.samples_in
        # one state per second is enough, however often this is called
        if state.working_s - self._seen[-1][0] >= 1.0:
            self._seen.append((state.working_s, samples, state.measures))
        while len(self._seen) > 1 and self._seen[1][0] < state.working_s - RECENT_S:
            self._seen.popleft()
        then_s, samples_then, measures_then = self._seen[0]
        passed_s = state.working_s - then_s
        # samples of unfinished shards are lost with their worker
        gained = max(0, samples - samples_then)
        return Pace(gained / passed_s if passed_s > 0 else 0.0, state.measures - measures_then)


def as_line(state: RunState, pace: Pace) -> str:
    """Return one log line: shards, samples, rate, images, what sets the pace, errors, workers, and times."""
    counts = state.counts_so_far
    waiting = "" if state.workers_ready else "waiting for workers | "
    return (
        f"{waiting}shards {state.shards_skipped + state.shards_done}/{state.shards_total}, "
        f"{state.shards_damaged} damaged, {state.shards_failed} failed, {state.shards_left} left | "
        f"samples {counts.samples_in:,} ({pace.samples_per_s:,.1f}/s), {counts.failed:,} failed | "
        f"images {state.measures.images_decoded:,} | rows {counts.rows:,} | "
        f"{pace_text(pace.measures, state.workers_ready)} | errors {_errors(counts)} | "
        f"workers {_workers(state)} | elapsed {as_duration(state.elapsed_s)}, remaining {_time_left(state)}"
    )


def _time_left(state: RunState) -> str:
    if not state.shards_done:
        return "?"
    if not state.samples_per_s or not state.counts.samples_in:
        return as_duration(state.working_s / state.shards_done * state.shards_left)
    # by samples, because shards in flight may be nearly done
    expected = state.counts.samples_in / state.shards_done * state.shards_left - state.live_counts.samples_in
    return as_duration(max(0.0, expected) / state.samples_per_s)


def _workers(state: RunState) -> str:
    text = workers_text(state.workers_ready, state.workers_wanted, state.workers_lost)
    alone = len(state.left_alone)
    return f"{text}, {alone:,} place{'s' if alone > 1 else ''} left alone" if alone else text


def _errors(counts: ShardCounts) -> str:
    largest = sorted(counts.errors_by_kind.items(), key=lambda item: -item[1])
    kinds = [f"{kind} {count:,}" for kind, count in largest[:SHOWN_KINDS]]
    kinds += ["..."] if len(largest) > SHOWN_KINDS else []
    return f"{counts.error_rows:,}" + (f" ({', '.join(kinds)})" if kinds else "")


class Progress(Protocol):
    """Receives the state of a run and messages, and decides when to show them."""

    def update(self, state: RunState) -> None:
        """Show the state of the run, perhaps later."""

    def say(self, message: str) -> None:
        """Show a message at once."""


class SharedProgress:
    """Pass everything on to several displays; log and remove one that fails, so that the run continues."""

    def __init__(self, parts: Sequence[Progress]) -> None:
        self._parts = list(parts)

    def update(self, state: RunState) -> None:
        """Pass the state on."""
        for part in tuple(self._parts):
            with self._remove_if_it_fails(part):
                part.update(state)

    def say(self, message: str) -> None:
        """Pass the message on."""
        for part in tuple(self._parts):
            with self._remove_if_it_fails(part):
                part.say(message)

    @contextmanager
    def _remove_if_it_fails(self, part: Progress) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._parts.remove(part)
            logger.warning(
                "%s failed (%s: %s); the run continues without it",
                type(part).__name__.strip("_"),
                type(error).__name__,
                printable(str(error)),
            )


class _TerminalProgress:
    def __init__(self, live: Live) -> None:
        self._live = live
        self._recent = RecentPace()

    def update(self, state: RunState) -> None:
        self._live.update(_display(state, self._recent.update(state)))

    def say(self, message: str) -> None:
        self._live.console.print(message)


class _LogProgress:
    def __init__(self, console: PrintableConsole, interval_s: float) -> None:
        self._console = console
        self._interval_s = interval_s
        self._last_shown_s = time.monotonic()
        self._recent = RecentPace()

    def update(self, state: RunState) -> None:
        pace = self._recent.update(state)
        now_s = time.monotonic()
        if now_s - self._last_shown_s >= self._interval_s:
            self._last_shown_s = now_s
            self.say(as_line(state, pace))

    def say(self, message: str) -> None:
        self._console.print(message, soft_wrap=True)


@contextmanager
def open_progress(console: PrintableConsole, interval_s: float) -> Iterator[Progress]:
    """Open a live display if the console is a terminal, else print one line every `interval_s` seconds."""
    if not console.is_terminal:
        yield _LogProgress(console, interval_s)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield _TerminalProgress(live)


def _display(state: RunState, pace: Pace) -> RenderableType:
    counts = state.counts_so_far
    finished = state.shards_total - state.shards_left
    lines = {
        "shards": f"{state.shards_skipped + state.shards_done:,}/{state.shards_total:,} done, "
        f"{state.shards_damaged:,} damaged, {state.shards_failed:,} failed, {state.shards_left:,} left",
        "samples": f"{counts.samples_in:,} at {pace.samples_per_s:,.1f}/s: {counts.annotated:,} annotated, "
        f"{counts.empty:,} empty, {counts.failed:,} failed",
        "images": f"{state.measures.images_decoded:,} decoded, {counts.rows:,} rows",
        "pace": pace_text(pace.measures, state.workers_ready)
        if state.workers_ready
        else "waiting for workers",
        "errors": _errors(counts),
        "workers": _workers(state),
        "time": f"{as_duration(state.elapsed_s)} so far, {_time_left(state)} left",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        table.add_row(Text(name, style="dim"), Text(value))
    display = Table.grid()
    display.add_row(ProgressBar(total=max(1, state.shards_total), completed=finished, width=60))
    display.add_row(table)
    return display
