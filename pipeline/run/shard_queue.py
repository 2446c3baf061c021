"""Which shard is worked on next, and which one is given up. Plain bookkeeping, no ray."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.storage import ShardSource

# a machine that goes away says nothing of its shards, unless it happens to the same shard again and again
MACHINES_LOST_BY_CHANCE = 5


@dataclass(frozen=True)
class GivenUp:
    """A shard that will not be tried again in this run."""

    shard: ShardSource
    attempts: int
    message: str


class ShardQueue:
    """Hands shards out, and remembers attempts and suspicions.

    A worker that dies says nothing of which of its shards killed it. So all that it had in hand become
    suspects, and a suspect runs alone on its worker: then the next death names it.

    Args:
        shards: the work, in order.
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

    def take(self, in_hand: Sequence[ShardSource], now_s: float) -> ShardSource | None:
        """The next shard for a worker, or None where it should have no more for now.

        Args:
            in_hand: what the worker is busy with.
            now_s: a monotonic clock, in seconds.
        """
        self._fresh.extendleft(self._rested(now_s))
        if any(shard.shard_id in self._tried_alone for shard in in_hand):
            return None
        if self._suspects and not in_hand:
            # the worker that takes a dead one's place comes with empty hands; busy ones need not run dry
            return self._take_suspect()
        return self._fresh.popleft() if self._fresh else None

    def worker_died(self, in_hand: Sequence[ShardSource], message: str) -> list[GivenUp]:
        """Suspect what a dead worker had in hand; give up what has now killed enough workers alone.

        Returns:
            The shards given up.
        """
        given_up = []
        for shard in in_hand:
            # only a shard that was alone is known to be guilty
            attempts = self._struck(shard) if len(in_hand) == 1 else 0
            if attempts >= self._max_attempts:
                given_up.append(GivenUp(shard, attempts, message))
            else:
                self._suspects.append(shard)
        return given_up

    def node_lost(self, in_hand: Sequence[ShardSource], message: str) -> list[GivenUp]:
        """Put back what a worker had in hand when its machine went away.

        That is no strike against any shard; only one that has lost MACHINES_LOST_BY_CHANCE machines is
        suspected of taking them down, as a shard that exhausts a machine's memory does.

        Returns:
            The shards given up.
        """
        self._machines_lost.update(shard.shard_id for shard in in_hand)
        if any(self._machines_lost[shard.shard_id] > MACHINES_LOST_BY_CHANCE for shard in in_hand):
            return self.worker_died(in_hand, message)
        self._fresh.extendleft(reversed(in_hand))
        return []

    def attempt_failed(self, shard: ShardSource, message: str, now_s: float) -> GivenUp | None:
        """Try a shard again after a while, unless it has had its attempts.

        Returns:
            The shard as given up, or None.
        """
        attempts = self._struck(shard)
        if attempts >= self._max_attempts:
            return GivenUp(shard, attempts, message)
        self._backing_off.append((now_s + self._backoff_s * 2 ** (attempts - 1), shard))
        return None

    def _struck(self, shard: ShardSource) -> int:
        self._attempts[shard.shard_id] = self._attempts.get(shard.shard_id, 0) + 1
        return self._attempts[shard.shard_id]

    def _take_suspect(self) -> ShardSource:
        suspect = self._suspects.popleft()
        self._tried_alone.add(suspect.shard_id)
        return suspect

    def _rested(self, now_s: float) -> list[ShardSource]:
        rested = [shard for until_s, shard in self._backing_off if until_s <= now_s]
        self._backing_off = [waiting for waiting in self._backing_off if waiting[0] > now_s]
        return rested
