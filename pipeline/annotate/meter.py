"""Measure a worker at work: images decoded, and the time that each stage took."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.output.measures import Measures

# times of threads and processes, which add up; the other measures are of the device and the clock
STAGES = ("reading_s", "decoding_s", "masks_s", "publishing_s")


class Meter:
    """Takes the measures of one worker; all its threads share it.

    Args:
        sample_processes: samples that are decoded and masked at a time.
    """

    def __init__(self, sample_processes: int = 1) -> None:
        self._lock = threading.Lock()
        self._sample_processes = sample_processes
        self._started_s = time.monotonic()
        self._images_decoded = 0
        self._steps_running = 0
        self._counted_until_s = self._started_s
        self._device_busy_s = 0.0
        self._stage_s = dict.fromkeys(STAGES, 0.0)

    def images_decoded(self, images: int) -> None:
        """Count images."""
        with self._lock:
            self._images_decoded += images

    def add(self, stage: str, seconds: float) -> None:
        """Add time of one of STAGES."""
        with self._lock:
            self._stage_s[stage] += seconds

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of a block to one of STAGES."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.add(stage, time.monotonic() - started_s)

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
            return Measures(
                images_decoded=self._images_decoded,
                device_busy_s=self._device_busy_s,
                ready_s=ready_s,
                sample_process_s=ready_s * self._sample_processes,
                **self._stage_s,
            )

    def _change_steps(self, change: int) -> None:
        with self._lock:
            self._count_busy_time()
            self._steps_running += change

    def _count_busy_time(self) -> None:
        now_s = time.monotonic()
        if self._steps_running:
            self._device_busy_s += now_s - self._counted_until_s
        self._counted_until_s = now_s
