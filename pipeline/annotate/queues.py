"""Queues of a stream: samples wait for the device by shape, tasks for threads by urgency."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class WaitingSamples(Generic[Item]):
    """Samples that wait for the device, grouped by shape; without threads or a clock.

    Args:
        batch_limit: most samples of a shape in one batch; called before every batch.
        max_wait_s: a sample that has waited longer goes next, even in a batch that is not full.
    """

    def __init__(self, batch_limit: Callable[[Hashable], int], max_wait_s: float) -> None:
        self._batch_limit = batch_limit
        self._max_wait_s = max_wait_s
        self._groups: dict[Hashable, deque[tuple[float, Item]]] = {}

    def __len__(self) -> int:
        return sum(len(group) for group in self._groups.values())

    def add(self, shape: Hashable, item: Item, now_s: float) -> None:
        """Add a sample.

        Args:
            shape: samples of equal shape may share a batch.
            item: the sample.
            now_s: a monotonic clock, in seconds.
        """
        self._groups.setdefault(shape, deque()).append((now_s, item))

    def take(self, now_s: float, *, flush: bool) -> list[Item]:
        """Return the next batch: of one shape, in the order of arrival; empty where it is better to wait.

        Args:
            now_s: the clock given to `add`.
            flush: no sample can arrive before the device has worked, so take a batch that is not full.
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
        """Remove the samples that a condition holds for."""
        kept = {
            shape: deque(entry for entry in group if not is_unwanted(entry[1]))
            for shape, group in self._groups.items()
        }
        self._groups = {shape: group for shape, group in kept.items() if group}

    def longest_wait_s(self, now_s: float) -> float | None:
        """Return the seconds until a sample has waited too long; None where none waits."""
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


class TaskPool:
    """Threads that take the most urgent task first, and of equally urgent ones the earliest."""

    def __init__(self, threads: int) -> None:
        self._tasks: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = started_threads("samples", threads, self._work)

    def submit(self, urgency: int, task: Callable[[], None]) -> None:
        """Queue a task, which must not raise.

        Args:
            urgency: lower goes first.
            task: what to do.
        """
        with self._changed:
            heapq.heappush(self._tasks, (urgency, next(self._numbers), task))
            self._changed.notify()

    def close(self) -> None:
        """Drop the tasks that have not begun, and wait for those that have."""
        with self._changed:
            self._is_closed = True
            self._tasks.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._tasks and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                task = heapq.heappop(self._tasks)[2]
            task()
            del task  # it may hold a sample's bytes


def started_threads(name: str, count: int, target: Callable[[], None]) -> list[threading.Thread]:
    """Start daemon threads that all run one function."""
    threads = [
        threading.Thread(target=target, name=f"{name}-{number}", daemon=True) for number in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads
