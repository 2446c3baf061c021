"""Decide which shard is annotated next and which one is given up; bookkeeping without Ray."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.storage import ShardSource

# losing a machine is not a shard's fault, unless it happens to the same shard again and again
MACHINES_LOST_BY_CHANCE = 5


@dataclass(frozen=True)
class GivenUp:
    """A shard that will not be tried again in this run."""

    shard: ShardSource
    attempts: int
    message: str


class ShardQueue:
    """Queue of shards that keeps count of attempts and of shards suspected of killing workers.

    When a worker is lost, any shard in flight on it may be the cause. So all of them become suspects, and a
    suspect runs alone on its worker: if that worker is lost too, the suspect was the cause.

    Args:
        shards: the shards to annotate, in order.
        max_attempts: attempts at one shard before it is given up.
        backoff_s: wait before a shard's second attempt; doubled for each further one.
    """

    def __init__(self, shards: Iterable[ShardSource], *, max_attempts: int, backoff_s: float) -> None:
        self._fresh = deque(shards)
        self._suspects: deque[ShardSource] = deque()
        self._backing_off: list[tuple[float, ShardSource]] = []
        self._tried_alone: set[str] = set()
        self._attempts: dict[str, int] = {}
        self._machines_lost: Counter[str] = Counter()
        self._max_attempts = max_attempts
        self._backoff_s = backoff_s

    def __len__(self) -> int:
        return len(self._fresh) + len(self._suspects) + len(self._backing_off)

    def take(self, in_flight: Sequence[ShardSource], now_s: float) -> ShardSource | None:
        """Return the next shard for a worker, or None if it should get no more for now.

        Args:
            in_flight: the shards that the worker is annotating.
            now_s: a monotonic clock, in seconds.
        """
        self._fresh.extendleft(self._take_due(now_s))
        if any(shard.shard_id in self._tried_alone for shard in in_flight):
            return None
        if self._suspects and not in_flight:
            # the worker that replaces a lost one is idle, so busy workers need not run dry for a suspect
            return self._take_suspect()
        return self._fresh.popleft() if self._fresh else None

    def worker_lost(self, in_flight: Sequence[ShardSource], message: str) -> list[GivenUp]:
        """Suspect the shards in flight on a lost worker; give up one that killed its worker alone too often.

        Returns:
            The shards given up.
        """
        given_up = []
        for shard in in_flight:
            # only a shard that ran alone is known to be the cause
            attempts = self._count_attempt(shard) if len(in_flight) == 1 else 0
            if attempts >= self._max_attempts:
                given_up.append(GivenUp(shard, attempts, message))
            else:
                self._suspects.append(shard)
        return given_up

    def machine_lost(self, in_flight: Sequence[ShardSource], message: str) -> list[GivenUp]:
        """Requeue the shards in flight on a worker whose machine was lost.

        That does not count as an attempt. Only a shard in flight on more than MACHINES_LOST_BY_CHANCE lost
        machines becomes a suspect: it may, for example, exhaust a machine's memory.

        Returns:
            The shards given up.
        """
        self._machines_lost.update(shard.shard_id for shard in in_flight)
        if any(self._machines_lost[shard.shard_id] > MACHINES_LOST_BY_CHANCE for shard in in_flight):
            return self.worker_lost(in_flight, message)
        self._fresh.extendleft(reversed(in_flight))
        return []

    def attempt_failed(self, shard: ShardSource, message: str, now_s: float) -> GivenUp | None:
        """Requeue a shard after a wait, unless its attempts are used up.

        Returns:
            The shard as given up, or None if it will be tried again.
        """
        attempts = self._count_attempt(shard)
        if attempts >= self._max_attempts:
            return GivenUp(shard, attempts, message)
        self._backing_off.append((now_s + self._backoff_s * 2 ** (attempts - 1), shard))
        return None

    def _count_attempt(self, shard: ShardSource) -> int:
        self._attempts[shard.shard_id] = self._attempts.get(shard.shard_id, 0) + 1
        return self._attempts[shard.shard_id]

    def _take_suspect(self) -> ShardSource:
        suspect = self._suspects.popleft()
        self._tried_alone.add(suspect.shard_id)
        return suspect

    def _take_due(self, now_s: float) -> list[ShardSource]:
        due = [shard for until_s, shard in self._backing_off if until_s <= now_s]
        self._backing_off = [waiting for waiting in self._backing_off if waiting[0] > now_s]
        return due
