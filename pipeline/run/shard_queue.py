"""Decide which shard is annotated next and which one is given up; bookkeeping without Ray."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from pipeline.run.hosting import Place
from pipeline.storage import ShardSource

# losing a machine is not a shard's fault, unless it happens to the same shard again and again
MACHINES_LOST_BY_CHANCE = 5
# a second place that never has a ready worker must not let a shard fail for ever
MOST_ROUNDS_AT_ONE_PLACE = 3
LONGEST_BACKOFF_S = 60.0


@dataclass(frozen=True)
class GivenUp:
    """A shard that will not be tried again in this run."""

    shard: ShardSource
    attempts: int
    message: str


class ShardQueue:
    """Queue of shards, largest first, that counts attempts and knows which shards may have killed a worker.

    When a worker is lost, any shard in flight on it may be the cause, or its place. So all of them become
    suspects, and a suspect runs alone, on a worker at another place. A shard is given up after its attempts
    only if they failed on two machines, or on two devices, where there are two.

    Args:
        shards: the shards to annotate; of equal sizes, the first ones come first.
        max_attempts: attempts at one shard before it is given up.
        backoff_s: wait before a shard's second attempt; doubled for each further one, up to
            LONGEST_BACKOFF_S.
    """

    def __init__(self, shards: Iterable[ShardSource], *, max_attempts: int, backoff_s: float) -> None:
        shards = list(shards)
        known = [shard.size_bytes for shard in shards if shard.size_bytes]
        self._usual_bytes = sum(known) / len(known) if known else 1.0
        self._ordinals = {shard.shard_id: ordinal for ordinal, shard in enumerate(shards)}
        # the last one is the next one
        self._fresh = sorted(self._entry(shard) for shard in shards)
        self._bytes = sum(size for size, _, _ in self._fresh)
        self._suspects: list[ShardSource] = []
        self._waiting: list[tuple[float, ShardSource]] = []
        self._tried_alone: set[str] = set()
        # counted attempts, and all places at which a shard was in flight when something went wrong
        self._failed_at: dict[str, list[Place]] = {}
        self._avoided: dict[str, set[Place]] = {}
        self._machines_lost: Counter[str] = Counter()
        self._max_attempts = max_attempts
        self._backoff_s = backoff_s

    def __len__(self) -> int:
        return len(self._fresh) + len(self._suspects) + len(self._waiting)

    @property
    def bytes_left(self) -> float:
        """Bytes of all shards in the queue; a shard of unknown size counts as one of the usual size."""
        return self._bytes

    @property
    def suspects(self) -> tuple[ShardSource, ...]:
        """The shards that wait for a worker on which they can run alone."""
        return tuple(self._suspects)

    def size_of(self, shard: ShardSource) -> float:
        """Return the size of a shard in bytes; the usual size if it is unknown."""
        return float(shard.size_bytes or self._usual_bytes)

    def take(
        self,
        place: Place,
        in_flight: Sequence[ShardSource],
        now_s: float,
        *,
        others: Collection[Place] = (),
        sound: Collection[Place] = (),
        most_bytes: float | None = None,
    ) -> ShardSource | None:
        """Return the next shard for a worker, or None if it should get no more for now.

        Args:
            place: where the worker runs.
            in_flight: the shards that the worker is annotating.
            now_s: a monotonic clock, in seconds.
            others: the other places at which workers are ready.
            sound: places that are not in doubt; where one of them may try a suspect, or a shard that failed,
                no other place does.
            most_bytes: largest size of a shard that no attempt was made at; None: any.
        """
        if any(shard.shard_id in self._tried_alone for shard in in_flight):
            return None
        better = set() if place in sound else {*sound} - {place}

        def may_run_here(shard: ShardSource) -> bool:
            return self.may_run_at(shard, place, others) and not any(
                self.may_run_at(shard, other, {*others, place} - {other})
                for other in better
                if shard.shard_id in self._avoided
            )

        if not in_flight:
            # what has not failed here first: it shows whether the shard or the place is at fault
            for shard in sorted(self._suspects, key=lambda one: self._has_failed_at(one, place)):
                if may_run_here(shard):
                    self._suspects.remove(shard)
                    self._tried_alone.add(shard.shard_id)
                    return self._taken(shard)
        if place not in sound and (fresh := self._take_fresh(most_bytes)):
            # it shows whether the place or the shards are at fault, without a second failure of a shard
            return fresh
        for waiting in self._waiting:
            until_s, shard = waiting
            if until_s <= now_s and may_run_here(shard):
                self._waiting.remove(waiting)
                return self._taken(shard)
        return self._take_fresh(most_bytes)

    def may_run_anywhere(self, shard: ShardSource) -> bool:
        """Return whether a shard has neither failed nor been taken from a worker."""
        return shard.shard_id not in self._avoided

    def may_run_at(self, shard: ShardSource, place: Place, others: Collection[Place]) -> bool:
        """Return whether a shard may be tried at a place: it failed elsewhere, or there is no better place.

        Another machine is better than another device.
        """
        avoided = self._avoided.get(shard.shard_id)
        if not avoided:
            return True
        machines = {one.machine_id for one in avoided}
        if place.machine_id not in machines:
            return True
        if any(other.machine_id not in machines for other in others):
            return False
        return place not in avoided or all(other in avoided for other in others)

    def _has_failed_at(self, shard: ShardSource, place: Place) -> bool:
        return place in self._avoided.get(shard.shard_id, ())

    def worker_lost(
        self, place: Place, in_flight: Sequence[ShardSource], message: str, others: Collection[Place] = ()
    ) -> list[GivenUp]:
        """Suspect the shards in flight on a lost worker; give up one that killed its workers alone too often.

        Args:
            place: where the worker ran.
            in_flight: the shards that were in flight on it.
            message: why it was lost.
            others: the other places at which workers are ready.

        Returns:
            The shards given up.
        """
        given_up = []
        for shard in in_flight:
            self._avoided.setdefault(shard.shard_id, set()).add(place)
            # which of several was the cause is unknown
            if len(in_flight) == 1 and self._is_last_attempt(shard, place, others):
                given_up.append(GivenUp(shard, self._attempts(shard), message))
            else:
                self._bytes += self.size_of(shard)
                self._suspects.append(shard)
        return given_up

    def machine_lost(
        self, place: Place, in_flight: Sequence[ShardSource], message: str, others: Collection[Place] = ()
    ) -> list[GivenUp]:
        """Requeue the shards in flight on a worker whose machine was lost.

        That does not count as an attempt. Only a shard in flight on more than MACHINES_LOST_BY_CHANCE lost
        machines becomes a suspect: it may, for example, exhaust a machine's memory.

        Returns:
            The shards given up.
        """
        self._machines_lost.update(shard.shard_id for shard in in_flight)
        if any(self._machines_lost[shard.shard_id] > MACHINES_LOST_BY_CHANCE for shard in in_flight):
            return self.worker_lost(place, in_flight, message, others)
        for shard in in_flight:
            self.put_back(shard)
        return []

    def attempt_failed(
        self,
        place: Place,
        shard: ShardSource,
        message: str,
        now_s: float,
        others: Collection[Place] = (),
    ) -> GivenUp | None:
        """Requeue a shard after a wait, unless its attempts are used up.

        Returns:
            The shard as given up, or None if it will be tried again.
        """
        if self._is_last_attempt(shard, place, others):
            return GivenUp(shard, self._attempts(shard), message)
        wait_s = min(LONGEST_BACKOFF_S, self._backoff_s * 2 ** (self._attempts(shard) - 1))
        self.put_back(shard, now_s + wait_s)
        return None

    def put_back(
        self, shard: ShardSource, until_s: float | None = None, *, avoided: Place | None = None
    ) -> None:
        """Requeue a shard without counting an attempt.

        Args:
            shard: the shard.
            until_s: not before this time; None: at once.
            avoided: a place at which it should not be tried next, if there is another one.
        """
        self._bytes += self.size_of(shard)
        if avoided is not None:
            self._avoided.setdefault(shard.shard_id, set()).add(avoided)
        if until_s is None:
            insort(self._fresh, self._entry(shard))
        else:
            self._waiting.append((until_s, shard))

    def forget_attempts_at(self, place: Place) -> None:
        """Count no longer what failed at a place that turned out to be at fault; no device: at a machine."""

        def is_there(failed: Place) -> bool:
            return failed == place or (not place.device and failed.machine_id == place.machine_id)

        for shard_id, failed_at in self._failed_at.items():
            self._failed_at[shard_id] = [failed for failed in failed_at if not is_there(failed)]

    def _is_last_attempt(self, shard: ShardSource, place: Place, others: Collection[Place]) -> bool:
        """Count a failed attempt; return whether there were enough, at enough places."""
        self._avoided.setdefault(shard.shard_id, set()).add(place)
        failed_at = self._failed_at.setdefault(shard.shard_id, [])
        failed_at.append(place)
        if len(failed_at) < self._max_attempts:
            return False
        if len(failed_at) >= MOST_ROUNDS_AT_ONE_PLACE * self._max_attempts:
            return True
        known = {*failed_at, *others}
        if len({one.machine_id for one in known}) > 1:
            return len({one.machine_id for one in failed_at}) > 1
        return len(known) == 1 or len(set(failed_at)) > 1

    def _attempts(self, shard: ShardSource) -> int:
        return len(self._failed_at.get(shard.shard_id, ()))

    def _take_fresh(self, most_bytes: float | None) -> ShardSource | None:
        end = len(self._fresh)
        if most_bytes is not None:
            end = bisect_right(self._fresh, most_bytes, key=_size)
        return self._taken(self._fresh.pop(end - 1)[2]) if end else None

    def _taken(self, shard: ShardSource) -> ShardSource:
        self._bytes -= self.size_of(shard)
        return shard

    def _entry(self, shard: ShardSource) -> tuple[float, int, ShardSource]:
        return self.size_of(shard), -self._ordinals[shard.shard_id], shard


def _size(entry: tuple[float, int, ShardSource]) -> float:
    return entry[0]
