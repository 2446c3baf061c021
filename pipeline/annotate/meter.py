"""Measure a worker at work: images decoded, and the time that each stage took."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.annotate.device_clock import DeviceClock
from pipeline.output.measures import Measures

# times of threads and processes, which add up; the other measures are of the device and the clock
STAGES = ("reading_s", "decoding_s", "masks_s", "publishing_s")


class Meter:
    """Takes the measures of one worker; all its threads share it.

    Args:
        clock: of the device.
        sample_processes: samples that are decoded and masked at a time.
    """

    def __init__(self, clock: DeviceClock, sample_processes: int = 1) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._sample_processes = sample_processes
        self._started_s = time.monotonic()
        self._images_decoded = 0
        # what it measured while the model was tried out is not of the job
        clock.take_busy_s()
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

    def read(self) -> Measures:
        """Return the measures so far."""
        with self._lock:
            self._device_busy_s += self._clock.take_busy_s()
            ready_s = time.monotonic() - self._started_s
            return Measures(
                images_decoded=self._images_decoded,
                device_busy_s=self._device_busy_s,
                ready_s=ready_s,
                sample_process_s=ready_s * self._sample_processes,
                **self._stage_s,
            )
