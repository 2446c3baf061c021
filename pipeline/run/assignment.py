"""Choose a shard for each worker that has room for one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from pipeline.run.balance import Balance
from pipeline.run.hosting import Place
from pipeline.run.places import Places
from pipeline.run.shard_queue import ShardQueue
from pipeline.run.worker_handle import WorkerHandle
from pipeline.storage import ShardSource


@dataclass(frozen=True)
class Assignments:
    """One round of assignments.

    Args:
        queue: the shards that no worker has.
        workers: those that are ready and may get shards.
        balance: how the rest of the job would be divided at best.
        places: what happened where.
        most_in_flight: shards of a worker at a time.
        now_s: the time.
    """

    queue: ShardQueue
    workers: Sequence[WorkerHandle]
    balance: Balance
    places: Places
    most_in_flight: int
    now_s: float

    def __iter__(self) -> Iterator[tuple[WorkerHandle, ShardSource]]:
        """Yield a worker and its shard; the caller adds the shard to those in flight before the next one."""
        here = frozenset(worker.place for worker in self.workers)
        awake = self._awake(here)
        sound = frozenset(place for place in awake if not self.places.is_on_probation(place))
        # where every place is in doubt, none is better than another
        usable = sound or awake
        reserved = self._reserved_for_suspects(here, usable)
        free = [one for one in self.workers if one.has_room and len(one.in_flight) < self.most_in_flight]
        # every worker gets its first shard before any gets its second
        for worker in sorted(free, key=lambda one: len(one.in_flight)):
            is_doubtful = worker.place not in usable or self.places.fails_in_a_row(worker.place)
            has_enough = bool(worker.in_flight) and (worker in reserved or is_doubtful)
            if has_enough or worker.place not in awake:
                continue
            if worker.place in usable or not self.places.is_in_question(worker.place):
                shard = self._next_shard(worker, here, sound)
                if shard is not None:
                    yield worker, shard

    def _awake(self, here: Collection[Place]) -> frozenset[Place]:
        awake = frozenset(place for place in here if self.places.may_try(place, self.now_s))
        return awake or frozenset(
            place for place in here if self.places.may_try(place, self.now_s, all_rest=True)
        )

    def _reserved_for_suspects(self, here: Collection[Place], sound: Collection[Place]) -> set[WorkerHandle]:
        """Return the workers that get nothing further, so that suspects can run on them alone."""
        reserved: set[WorkerHandle] = set()
        if not self.queue.suspects:
            return reserved
        # the ones at sound places first, and those that are idle soonest
        candidates = sorted(self.workers, key=lambda one: (one.place not in sound, len(one.in_flight)))
        for shard in self.queue.suspects:
            for worker in candidates:
                others = {*here} - {worker.place}
                if worker not in reserved and self.queue.may_run_at(shard, worker.place, others):
                    reserved.add(worker)
                    break
        return reserved

    def _next_shard(
        self, worker: WorkerHandle, here: Collection[Place], sound: Collection[Place]
    ) -> ShardSource | None:
        most_bytes = None
        if worker.in_flight:
            most_bytes = self.balance.most_further_bytes(worker.load(self.now_s))
            if most_bytes <= 0:
                return None
        return self.queue.take(
            worker.place,
            [one.shard for one in worker.in_flight.values()],
            self.now_s,
            others={*here} - {worker.place},
            sound=sound,
            most_bytes=most_bytes,
        )
