"""Measure how long a device was busy: by events on CUDA, by wall time on a CPU."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch


class DeviceClock(Protocol):
    """Adds up the time in which a device worked; two things at the same time count once."""

    def work(self) -> Any:
        """Return a context manager around the calls that give work to the device."""

    def take_busy_s(self) -> float:
        """Return the seconds of work that became known since the last call; wait for nothing."""


def device_clock(device: torch.device) -> DeviceClock:
    """Return a clock for a device."""
    return EventClock(partial(torch.cuda.Event, enable_timing=True)) if device.type == "cuda" else WallClock()


class WallClock:
    """Takes the time between the start and the end of the calls, for a device that computes during them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._counted_until_s = 0.0
        self._busy_s = 0.0

    @contextmanager
    def work(self) -> Iterator[None]:
        """Measure the calls inside; several threads may be inside."""
        self._change(+1)
        try:
            yield
        finally:
            self._change(-1)

    def take_busy_s(self) -> float:
        """Return the seconds of work since the last call."""
        with self._lock:
            self._count()
            busy_s, self._busy_s = self._busy_s, 0.0
            return busy_s

    def _change(self, by: int) -> None:
        with self._lock:
            self._count()
            self._running += by

    def _count(self) -> None:
        now_s = time.perf_counter()
        if self._running:
            self._busy_s += now_s - self._counted_until_s
        self._counted_until_s = now_s


class EventClock:
    """Records an event before and after the calls on the current stream; reads them once they have happened.

    Events of several streams are compared in the order in which their work was begun.

    Args:
        new_event: makes an event with `record`, `query` and `elapsed_time`, as `torch.cuda.Event` has them.
    """

    def __init__(self, new_event: Any) -> None:
        self._new_event = new_event
        self._lock = threading.Lock()
        self._intervals: deque[list[Any]] = deque()  # start and, once the calls have returned, end
        self._latest_end: Any = None

    @contextmanager
    def work(self) -> Iterator[None]:
        """Measure the work given to the current stream inside."""
        start = self._new_event()
        start.record()
        interval = [start]
        with self._lock:
            self._intervals.append(interval)
        try:
            yield
        finally:
            end = self._new_event()
            end.record()
            interval.append(end)

    def take_busy_s(self) -> float:
        """Return the seconds of the intervals that have ended, and were not returned before."""
        busy_ms = 0.0
        with self._lock:
            while self._intervals and len(self._intervals[0]) > 1 and self._intervals[0][1].query():
                busy_ms += self._not_counted_ms(*self._intervals.popleft())
        return busy_ms / 1000

    def _not_counted_ms(self, start: Any, end: Any) -> float:
        """Return how much of an interval lies after the end of all those before it."""
        interval_ms: float = start.elapsed_time(end)
        after_others_ms = interval_ms if self._latest_end is None else self._latest_end.elapsed_time(end)
        if after_others_ms > 0 or self._latest_end is None:
            self._latest_end = end
        return max(0.0, min(interval_ms, after_others_ms))
