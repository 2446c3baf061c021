"""What a worker measures of itself while it works: images decoded, and how long its device was busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Measures:
    """What one worker, or several together, have done since their models were loaded.

    Attributes:
        images_decoded: images decoded and resized, whatever became of their samples.
        device_busy_s: seconds in which the device step ran.
        ready_s: seconds since the model was loaded; of several workers, their sum.
    """

    images_decoded: int = 0
    device_busy_s: float = 0.0
    ready_s: float = 0.0

    @property
    def device_busy_share(self) -> float | None:
        """Share of the ready time in which the device step ran, in [0, 1]; None where there was none."""
        return min(1.0, self.device_busy_s / self.ready_s) if self.ready_s > 0 else None

    def __add__(self, other: Measures) -> Measures:
        return Measures(
            self.images_decoded + other.images_decoded,
            self.device_busy_s + other.device_busy_s,
            self.ready_s + other.ready_s,
        )

    def __sub__(self, earlier: Measures) -> Measures:
        return Measures(
            self.images_decoded - earlier.images_decoded,
            self.device_busy_s - earlier.device_busy_s,
            self.ready_s - earlier.ready_s,
        )


class Meter:
    """Takes the measures of one worker; its threads share it."""

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
        """Measure a device step; while several run, the time counts once."""
        self._change_steps(+1)
        try:
            yield
        finally:
            self._change_steps(-1)

    def read(self) -> Measures:
        """The measures so far."""
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
