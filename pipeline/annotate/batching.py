"""Which samples go to the device together: of one shape, full batches first, nobody left waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class WaitingSamples(Generic[Item]):
    """Samples that wait for the device, by shape. Plain bookkeeping: no threads, no clock of its own.

    Args:
        batch_limit: most samples of a shape in one batch; asked anew for every batch.
        max_wait_s: a sample that has waited longer goes next, in whatever company it has.
    """

    def __init__(self, batch_limit: Callable[[Hashable], int], max_wait_s: float) -> None:
        self._batch_limit = batch_limit
        self._max_wait_s = max_wait_s
        self._groups: dict[Hashable, deque[tuple[float, Item]]] = {}

    def __len__(self) -> int:
        return sum(len(group) for group in self._groups.values())

    def add(self, shape: Hashable, item: Item, now_s: float) -> None:
        """Let a sample wait.

        Args:
            shape: samples of equal shape may share a batch.
            item: the sample.
            now_s: a monotonic clock, in seconds.
        """
        self._groups.setdefault(shape, deque()).append((now_s, item))

    def take(self, now_s: float, *, flush: bool) -> list[Item]:
        """The next batch: of one shape, in the order of arrival; empty where waiting is better.

        Args:
            now_s: the clock given to `add`.
            flush: nothing more can come before the device has worked, so that a part of a batch goes too.
        """
        if not self._groups:
            return []
        oldest = min(self._groups, key=self._waiting_since)
        if now_s - self._waiting_since(oldest) < self._max_wait_s:
            full = [shape for shape in self._groups if len(self._groups[shape]) >= self._batch_limit(shape)]
            if full:
                oldest = min(full, key=self._waiting_since)
            elif flush:
                oldest = max(self._groups, key=lambda shape: len(self._groups[shape]))
            else:
                return []
        return self._cut(oldest)

    def discard(self, is_unwanted: Callable[[Item], bool]) -> None:
        """Forget some of the samples."""
        kept = {
            shape: deque(entry for entry in group if not is_unwanted(entry[1]))
            for shape, group in self._groups.items()
        }
        self._groups = {shape: group for shape, group in kept.items() if group}

    def patience_s(self, now_s: float) -> float | None:
        """Seconds until a sample has waited too long; None where none waits."""
        if not self._groups:
            return None
        return max(0.0, min(map(self._waiting_since, self._groups)) + self._max_wait_s - now_s)

    def _waiting_since(self, shape: Hashable) -> float:
        return self._groups[shape][0][0]

    def _cut(self, shape: Hashable) -> list[Item]:
        group = self._groups[shape]
        batch = [group.popleft()[1] for _ in range(min(len(group), self._batch_limit(shape)))]
        if not group:
            del self._groups[shape]
        return batch
