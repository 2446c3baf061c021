"""OUT/runs/: a small JSON file for each run, renewed while it goes on, to be looked at meanwhile or later."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline import storage
from pipeline.errors import DamagedFileError
from pipeline.output.folder import RUNS, OutputFolder
from pipeline.output.measures import Measures
from pipeline.output.reading import RunFile, read_record
from pipeline.output.run_state import RunState

INTERVAL_S = 60.0
MAX_POINTS = 256
RUNNING = "running"
# for a record at the end of a run
LONGEST_WAIT_S = 20.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind about itself.

    Attributes:
        started: when, in UTC.
        updated: when the record was last renewed; a run that is killed goes silent.
        ended: running, or how the run ended.
        elapsed_s: duration up to then.
        shards_done: in this run.
        samples: that reached an outcome in this run.
        samples_per_s: mean over the time in which workers were ready.
        measures: of all its workers.
        workers: that were ready when the record was renewed.
        history: how it went: seconds since its start and samples until then, at most MAX_POINTS of them.
    """

    started: str
    updated: str
    ended: str
    elapsed_s: float
    shards_done: int
    samples: int
    samples_per_s: float
    measures: Measures
    workers: int
    history: tuple[tuple[float, int], ...] = ()

    def as_json(self) -> bytes:
        """The record as it is written."""
        document = {**vars(self), "measures": vars(self.measures)}
        return (json.dumps(document, indent=2) + "\n").encode()


class _History:
    """Points of a run, evenly spaced and bounded: where they become too many, every other one is dropped."""

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
        """The points, and the state as the last one."""
        end = _point(state)
        return (*self._points, end) if end[0] > self._points[-1][0] else tuple(self._points)


def _point(state: RunState) -> tuple[float, int]:
    return round(state.elapsed_s, 1), state.counts_so_far.samples_in


class RunRecorder:
    """Publishes the state of a run every minute, and once more at its end.

    A record that cannot be written is left out and told once: no reason to end a run, or to hold it up.
    """

    def __init__(self, folder: OutputFolder) -> None:
        self._folder = folder
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._state = RunState(shards_total=0, shards_skipped=0)
        self._history = _History()
        self._next_s = 0.0
        self._writing: threading.Thread | None = None
        self._failed = False

    def update(self, state: RunState) -> None:
        """Take the newest state in, and publish it where the last time is a minute ago."""
        self._state = state
        self._history.update(state)
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + INTERVAL_S
            self._publish(RUNNING)

    def say(self, message: str) -> None:
        """Messages are not recorded."""

    def close(self, ended: str) -> None:
        """Record how the run ended, if it had begun."""
        if self._next_s:
            self._wait()
            self._publish(ended)
            self._wait()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.join(LONGEST_WAIT_S)

    def _publish(self, ended: str) -> None:
        state = self._state
        record = RunRecord(
            started=self._started,
            updated=datetime.now(UTC).isoformat(timespec="seconds"),
            ended=ended,
            elapsed_s=round(state.elapsed_s, 1),
            shards_done=state.shards_done,
            samples=state.counts_so_far.samples_in,
            samples_per_s=round(state.samples_per_s, 2),
            measures=state.measures,
            workers=state.workers_ready,
            history=self._history.until(state),
        )
        self._write(record.as_json())

    def _write(self, content: bytes) -> None:
        """Write in the background: a store that dawdles holds up neither the run nor its end."""
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
                logger.warning("the record of this run cannot be written: %s; the run goes on", error)


@contextmanager
def recorded_run(folder: OutputFolder) -> Iterator[RunRecorder]:
    """A recorder that also knows of exceptions and signals; without them, whoever opened it closes it."""
    recorder = RunRecorder(folder)
    try:
        yield recorder
    except BaseException as error:
        recorder.close(_named(error))
        raise


def _named(error: BaseException) -> str:
    names = {KeyboardInterrupt: "interrupted", SystemExit: "terminated"}
    return names.get(type(error), f"failed: {type(error).__name__}")


def latest_run(output_dir: str) -> RunRecord | None:
    """The record of the newest run; None where there is none that can be read."""
    records, _ = latest_runs(output_dir, 1)
    return records[0] if records else None


def latest_runs(output_dir: str, most: int) -> tuple[list[RunRecord], list[str]]:
    """The records of the newest runs, oldest first; and a line for each that cannot be read."""
    records: list[RunRecord] = []
    damaged: list[str] = []
    for name in _record_names(output_dir)[-most:]:
        try:
            records.append(_read_record(output_dir, name))
        except DamagedFileError as error:
            damaged.append(str(error))
    return records, damaged


def _record_names(output_dir: str) -> list[str]:
    folder = storage.join_url(output_dir, RUNS)
    return sorted(name for name in storage.list_names(folder) if name.endswith(".json"))


def _read_record(output_dir: str, name: str) -> RunRecord:
    file = read_record(storage.join_url(output_dir, RUNS, name), RunFile)
    fields = {name: getattr(file, name) for name in RunFile.model_fields}
    measures = Measures(**file.measures.model_dump())
    return RunRecord(**{**fields, "measures": measures, "history": tuple(file.history)})
