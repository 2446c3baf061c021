"""Threads for many small tasks, the urgent ones first."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable


class TaskPool:
    """Threads that take the most urgent task first, and of equally urgent ones the earliest."""

    def __init__(self, threads: int) -> None:
        self._tasks: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"samples-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, urgency: int, task: Callable[[], None]) -> None:
        """Have a task done; it must not raise.

        Args:
            urgency: lower goes first.
            task: what to do.
        """
        with self._changed:
            heapq.heappush(self._tasks, (urgency, next(self._numbers), task))
            self._changed.notify()

    def close(self) -> None:
        """Forget what has not begun, and wait for what has."""
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
