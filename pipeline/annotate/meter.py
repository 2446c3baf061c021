"""Measure a worker at work: images decoded, and how long its device was busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.output.measures import Measures


class Meter:
    """Takes the measures of one worker; all its threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started_s = time.monotonic()
        self._images_decoded = 0
        self._steps_running = 0
        self._counted_until_s = self._started_s
        self._device_busy_s = 0.0

    def image_decoded(self) -> None:
        """Count one image."""
        with self._lock:
            self._images_decoded += 1

    @contextmanager
    def device_step(self) -> Iterator[None]:
        """Measure a device step; time in which several run counts once."""
        self._change_steps(+1)
        try:
            yield
        finally:
            self._change_steps(-1)

    def read(self) -> Measures:
        """Return the measures so far."""
        with self._lock:
            self._count_busy_time()
            ready_s = self._counted_until_s - self._started_s
            return Measures(self._images_decoded, self._device_busy_s, ready_s)

    def _change_steps(self, change: int) -> None:
        with self._lock:
            self._count_busy_time()
            self._steps_running += change

    def _count_busy_time(self) -> None:
        now_s = time.monotonic()
        if self._steps_running:
            self._device_busy_s += now_s - self._counted_until_s
        self._counted_until_s = now_s
