"""The state of a run: counts of shards and samples, workers ready, elapsed time."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.output.counts import ShardCounts
from pipeline.output.measures import Measures


@dataclass(frozen=True)
class RunState:
    """Progress of a run at one moment.

    Attributes:
        shards_total: shards of the job.
        shards_skipped: done before this run.
        shards_done: done in this run.
        shards_failed: given up.
        shards_damaged: published from archives that could not be read to their end; includes earlier runs.
        counts: outcomes of the samples of shards done in this run.
        live_counts: outcomes so far in shards in flight.
        measures: of all workers of this run, since each loaded its model.
        workers_ready: workers that have loaded their model.
        elapsed_s: seconds since the workers were started.
        loading_s: seconds until the first worker was ready; equal to elapsed_s while none is.
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
