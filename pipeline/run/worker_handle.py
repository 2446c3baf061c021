"""What the dispatcher knows of a worker, and of each shard in flight on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.annotate.annotator import ShardProgress
from pipeline.output.counts import ShardCounts
from pipeline.output.measures import Measures
from pipeline.run.balance import Load
from pipeline.run.hosting import Place
from pipeline.run.plan import WorkerShape
from pipeline.storage import ShardSource

SHARDS_OF_A_KNOWN_SPEED = 3


@dataclass(eq=False)
class ShardInFlight:
    """A shard that a worker annotates.

    Attributes:
        shard: the shard.
        size_bytes: its size, or the usual size if that is unknown.
        started_s: when it was assigned.
        progressed_s: when it last progressed, or one that was begun before it on this worker.
        progress: as last reported.
        abandoned_s: when the worker was asked not to publish it; None: it was not.
        is_moved: whether that was so that another worker does it, on a machine that stays or sooner, and not
            because it does not progress.
        was_publishing: whether the worker answered that it is publishing it.
    """

    shard: ShardSource
    size_bytes: float
    started_s: float
    progressed_s: float
    progress: ShardProgress = field(default_factory=lambda: ShardProgress(ShardCounts()))
    abandoned_s: float | None = None
    is_moved: bool = False
    was_publishing: bool = False

    def reported(self, progress: ShardProgress, now_s: float) -> bool:
        """Take over what the worker reports; return whether it has finished samples since the last report."""
        has_progressed = progress.counts != self.progress.counts
        if has_progressed:
            self.progressed_s = now_s
        self.progress = progress
        return has_progressed

    def expected_s(self, now_s: float) -> float | None:
        """Return the seconds until it is finished, if it goes on as so far; None if that cannot be known."""
        done, taken_s = self.progress.done_share, self.progressed_s - self.started_s
        return max(0.0, taken_s / done - (now_s - self.started_s)) if done > 0 else None


@dataclass(eq=False)
class WorkerHandle:
    """A worker of this run, from the request for its process to its end.

    Attributes:
        number: by which the host knows it.
        shape: its resources.
        is_ask: whether it was requested only to show the cluster what is wanted.
        state: requested; held: it occupies a device that is not to be used; loading; ready.
        place: where it runs, once it has started.
        ready_s: when it had loaded its model.
        has_room: whether it would begin another shard at once.
        takes_no_more: whether it gets no further shard and ends after those in flight.
        in_flight: shards assigned and not finished, by id.
        bytes_done, shards_done: of the shards that it has finished.
        measures: as last reported.
        asked_s: when it was asked to load its model, or for its progress, and has not answered; None: it is
            not asked.
    """

    number: int
    shape: WorkerShape
    is_ask: bool = False
    state: Literal["requested", "held", "loading", "ready"] = "requested"
    place: Place = field(default_factory=Place)
    ready_s: float = 0.0
    has_room: bool = False
    takes_no_more: bool = False
    in_flight: dict[str, ShardInFlight] = field(default_factory=dict)
    bytes_done: float = 0.0
    shards_done: int = 0
    measures: Measures = field(default_factory=Measures)
    asked_s: float | None = None

    @property
    def machine_id(self) -> str:
        """The machine on which it runs, or is meant to run; empty: any."""
        return self.place.machine_id or self.shape.node_id

    @property
    def is_holder(self) -> bool:
        """Whether it only occupies a bad device, without any core, so that others get the good ones."""
        return not self.shape.cpus

    def bytes_per_s(self, now_s: float) -> float | None:
        """Return its speed since it is ready; None before it has finished a few shards."""
        if self.shards_done < SHARDS_OF_A_KNOWN_SPEED or now_s <= self.ready_s:
            return None
        return self.bytes_done / (now_s - self.ready_s)

    def expected_s(self, one: ShardInFlight, now_s: float) -> float | None:
        """Return the seconds until a shard in flight is finished; None if that cannot be known.

        A shard seems slow while it is opened, and while the device works on those that were begun before it.
        So the time for all shards in flight, at the worker's usual speed, counts if that is less.
        """
        by_progress, load = one.expected_s(now_s), self.load(now_s)
        by_speed = load.bytes_left / load.bytes_per_s if load.bytes_per_s else None
        return min((time_s for time_s in (by_progress, by_speed) if time_s is not None), default=None)

    def progressed(self, one: ShardInFlight, now_s: float) -> None:
        """Let the shards that were begun later, and whose turn has not come, wait no longer than from now."""
        for other in self.in_flight.values():
            if other.started_s >= one.started_s and not other.progress.counts.samples_in:
                other.progressed_s = now_s

    def load(self, now_s: float) -> Load:
        """Return what it still has to do."""
        left = sum(one.size_bytes * (1 - one.progress.done_share) for one in self.in_flight.values())
        return Load(left, self.bytes_per_s(now_s))
