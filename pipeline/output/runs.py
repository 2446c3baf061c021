"""The state of a run, and its record in OUT/runs/, which is updated every minute."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from pipeline import storage
from pipeline.errors import DamagedFileError
from pipeline.output.counts import ShardCounts
from pipeline.output.folder import RUNS, OutputFolder
from pipeline.output.measures import Measures, Step, pace_setter
from pipeline.output.records import Count, Record, Seconds, as_json, utc_now
from pipeline.output.tables import read_record

INTERVAL_S = 60.0
MAX_POINTS = 256
MAX_WORST_SHARDS = 5
RUNNING = "running"
ENDINGS: dict[type[BaseException], str] = {KeyboardInterrupt: "interrupted", SystemExit: "terminated"}
# for a record at the end of a run
LONGEST_WAIT_S = 20.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """The state of a run, as its driver knows it.

    Attributes:
        shards_total: shards of the job.
        shards_skipped: done in earlier runs.
        shards_done: done in this run.
        shards_failed: given up.
        shards_damaged: published shards whose archive could not be read to its end, including those of
            earlier runs.
        counts: outcomes of the samples of shards done in this run.
        live_counts: outcomes in shards in flight.
        measures: of all workers of this run, since each loaded its model.
        workers_ready: workers that have loaded their model.
        workers_wanted: workers that the run would have if the cluster gave it all resources it asks for.
        workers_lost: workers whose process or machine was lost in this run.
        left_alone: places that get no further shards, each with the reason, such as
            ``10.0.0.7, GPU 3: 3 workers lost with shards that others finished``.
        worst_shards: URL, failed samples and samples of finished shards with a larger share of failed
            samples than `run.error_budget`; the largest shares first, at most MAX_WORST_SHARDS.
        shards_over_budget: number of finished shards with such a share.
        elapsed_s: seconds since the workers were requested.
        loading_s: seconds until the first worker was ready; all elapsed seconds while none is.
    """

    shards_total: int
    shards_skipped: int
    shards_done: int = 0
    shards_failed: int = 0
    shards_damaged: int = 0
    counts: ShardCounts = field(default_factory=ShardCounts)
    live_counts: ShardCounts = field(default_factory=ShardCounts)
    measures: Measures = field(default_factory=Measures)
    workers_ready: int = 0
    workers_wanted: int = 0
    workers_lost: int = 0
    left_alone: tuple[str, ...] = ()
    worst_shards: tuple[tuple[str, int, int], ...] = ()
    shards_over_budget: int = 0
    elapsed_s: float = 0.0
    loading_s: float = 0.0

    @property
    def shards_left(self) -> int:
        """Shards that are neither published nor given up."""
        settled = self.shards_skipped + self.shards_done + self.shards_damaged + self.shards_failed
        return self.shards_total - settled

    @property
    def working_s(self) -> float:
        """Seconds since the first worker was ready."""
        return self.elapsed_s - self.loading_s

    @property
    def counts_so_far(self) -> ShardCounts:
        """Outcomes of samples in this run, shards in flight included."""
        return self.counts + self.live_counts

    @property
    def samples_per_s(self) -> float:
        """Mean over the time in which workers were ready."""
        return self.counts_so_far.samples_in / self.working_s if self.working_s > 0 else 0.0


class RunRecord(Record):
    """OUT/runs/RUN-ID.json: the progress of a run, updated while it goes on.

    Attributes:
        started: start of the run, in UTC.
        updated: when the record was last updated; a run that is killed stops updating it.
        ended: running, or how the run ended.
        elapsed_s: seconds from the start to the last update.
        shards_done: shards annotated in this run.
        samples: samples that reached an outcome in this run.
        samples_per_s: mean over the time in which workers were ready.
        measures: of all workers.
        pace_set_by: step that set the pace of the whole run; None while that is unknown.
        workers: workers that were ready at the last update.
        workers_wanted: workers that the run would have had with all resources it asked for; 0 if unknown.
        workers_lost: workers whose process or machine was lost in this run.
        left_alone: places that got no further shards, each with the reason.
        history: seconds since the start and samples until then; at most MAX_POINTS pairs are written.
    """

    started: str
    updated: str
    ended: str
    elapsed_s: Seconds
    shards_done: Count
    samples: Count
    samples_per_s: Seconds
    measures: Measures
    pace_set_by: Step | None = None
    workers: Count
    workers_wanted: Count = 0
    workers_lost: Count = 0
    left_alone: Annotated[tuple[str, ...], Field(max_length=100_000)] = ()
    history: Annotated[tuple[tuple[Seconds, Count], ...], Field(max_length=100_000)] = ()


class _History:
    """Points of a run, evenly spaced; when there are too many, every other one is dropped."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = [(0.0, 0)]
        self._spacing_s = 1.0

    def update(self, state: RunState) -> None:
        if state.elapsed_s < self._points[-1][0] + self._spacing_s:
            return
        self._points.append(_point(state))
        if len(self._points) >= MAX_POINTS:
            self._points = self._points[::2]
            self._spacing_s *= 2

    def until(self, state: RunState) -> tuple[tuple[float, int], ...]:
        """Return the points, with the state as the last one."""
        end = _point(state)
        return (*self._points, end) if end[0] > self._points[-1][0] else tuple(self._points)


def _point(state: RunState) -> tuple[float, int]:
    return round(state.elapsed_s, 1), state.counts_so_far.samples_in


class RunRecorder:
    """Publish the state of a run every minute, and once more at its end.

    A record that cannot be written neither ends nor delays the run; a warning is logged once.
    """

    def __init__(self, folder: OutputFolder) -> None:
        self._folder = folder
        self._started = utc_now()
        self._state = RunState(shards_total=0, shards_skipped=0)
        self._history = _History()
        self._next_s = 0.0
        self._writing: threading.Thread | None = None
        self._failed = False

    def update(self, state: RunState) -> None:
        """Keep the newest state, and publish it if the last record is a minute old."""
        self._state = state
        self._history.update(state)
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + INTERVAL_S
            self._publish(RUNNING)

    def say(self, message: str) -> None:
        """Ignore a message; messages are not recorded."""

    def close(self, ended: str) -> None:
        """Record how the run ended, if it had started."""
        if self._next_s:
            self._wait()
            self._publish(ended)
            self._wait()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.join(LONGEST_WAIT_S)

    def _publish(self, ended: str) -> None:
        state = self._state
        # an unlikely value must not end the run
        record = RunRecord.model_construct(
            started=self._started,
            updated=utc_now(),
            ended=ended,
            elapsed_s=round(state.elapsed_s, 1),
            shards_done=state.shards_done,
            samples=state.counts_so_far.samples_in,
            samples_per_s=round(state.samples_per_s, 2),
            measures=state.measures,
            pace_set_by=pace_setter(state.measures),
            workers=state.workers_ready,
            workers_wanted=state.workers_wanted,
            workers_lost=state.workers_lost,
            left_alone=state.left_alone,
            history=self._history.until(state),
        )
        self._write(as_json(record.model_dump()))

    def _write(self, content: bytes) -> None:
        """Write in the background, so that a slow store delays neither the run nor its end."""
        if self._writing is not None and self._writing.is_alive():
            return
        self._writing = threading.Thread(target=self._written, args=(content,), daemon=True)
        self._writing.start()

    def _written(self, content: bytes) -> None:
        try:
            self._folder.publish(f"{self._folder.run_id}.json", content, RUNS)
        except Exception as error:
            if not self._failed:
                self._failed = True
                logger.warning("cannot write the record of this run: %s; the run continues", error)


@contextmanager
def recorded_run(folder: OutputFolder) -> Iterator[RunRecorder]:
    """Return a recorder that also records exceptions and signals; without them, the caller closes it."""
    recorder = RunRecorder(folder)
    try:
        yield recorder
    except BaseException as error:
        recorder.close(ENDINGS.get(type(error), f"failed: {type(error).__name__}"))
        raise


def workers_text(ready: int, wanted: int, lost: int) -> str:
    """Return the workers of a run for display: ``6 of 8, 2 lost``; only those ready where `wanted` is 0."""
    text = f"{ready:,} of {wanted:,}" if wanted else f"{ready:,}"
    return f"{text}, {lost:,} lost" if lost else text


def latest_run(folder: OutputFolder) -> RunRecord | None:
    """Return the record of the newest run; None if there is none that can be read."""
    records, _ = latest_runs(folder, 1)
    return records[0] if records else None


def latest_runs(folder: OutputFolder, most: int) -> tuple[list[RunRecord], list[str]]:
    """Return the records of the newest runs, oldest first, and a line for each that cannot be read."""
    url = storage.join_url(folder.url, RUNS)
    names = sorted(name for name in storage.list_names(url) if name.endswith(".json"))
    records: list[RunRecord] = []
    damaged: list[str] = []
    for name in names[-most:]:
        try:
            records.append(read_record(storage.join_url(url, name), RunRecord))
        except DamagedFileError as error:
            damaged.append(str(error))
    return records, damaged
