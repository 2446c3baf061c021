"""What workers measure of themselves, and which step sets their pace."""

from __future__ import annotations

import operator
from dataclasses import astuple, dataclass
from typing import Literal

from pipeline.output.records import Count, Seconds
from pipeline.text import as_share

Step = Literal["reading", "decoding", "device", "masks", "publishing"]
STEPS: tuple[Step, ...] = ("reading", "decoding", "device", "masks", "publishing")
# a step that is busy for so much of its time sets the pace
SATURATED = 0.9
# below this, no step is busy enough to be named
LEAST_SHARE = 0.5
LEAST_READY_S = 1.0


@dataclass(frozen=True)
class Measures:
    """Images and times of one worker, or of several together, since their models were loaded.

    Times of several threads, processes or workers are added up, so each may exceed the time that has passed.

    Attributes:
        images_decoded: images decoded and resized, whatever the outcome of their samples.
        device_busy_s: seconds in which the device step ran.
        ready_s: seconds since the model was loaded.
        reading_s: seconds in which a thread that reads a shard waited for the shard's bytes.
        decoding_s: seconds in which a sample process prepared samples: captions, decoding, resizing.
        masks_s: seconds in which a sample process turned maps into masks and rows.
        publishing_s: seconds in which a shard's files were completed and published.
        sample_process_s: seconds that the sample processes had, busy or not.
    """

    images_decoded: Count = 0
    device_busy_s: Seconds = 0.0
    ready_s: Seconds = 0.0
    reading_s: Seconds = 0.0
    decoding_s: Seconds = 0.0
    masks_s: Seconds = 0.0
    publishing_s: Seconds = 0.0
    sample_process_s: Seconds = 0.0

    @property
    def device_busy_share(self) -> float | None:
        """Share of the ready time in which the device step ran, in [0, 1]; None without ready time."""
        return min(1.0, self.device_busy_s / self.ready_s) if self.ready_s > 0 else None

    @property
    def sample_process_busy_share(self) -> float | None:
        """Share of the sample processes' time in which they were busy, in [0, 1]; None without processes."""
        if self.sample_process_s <= 0:
            return None
        return min(1.0, (self.decoding_s + self.masks_s) / self.sample_process_s)

    def __add__(self, other: Measures) -> Measures:
        return Measures(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, earlier: Measures) -> Measures:
        return Measures(*map(operator.sub, astuple(self), astuple(earlier)))


def pace_setter(measures: Measures) -> Step | None:
    """Return the step that sets the pace.

    It is the device if that is saturated, else the sample processes if they are. Where neither is, something
    keeps samples from them: the step with the largest share of the workers' time, at least LEAST_SHARE.
    Reading and publishing go on in one thread a shard, so their shares may exceed 1.

    Args:
        measures: of the time that is judged.

    Returns:
        The step; None before workers have been ready for LEAST_READY_S, and where no step is busy.
    """
    if measures.ready_s < LEAST_READY_S:
        return None
    device_share = measures.device_busy_share or 0.0
    process_share = measures.sample_process_busy_share or 0.0
    in_processes: Step = "decoding" if measures.decoding_s >= measures.masks_s else "masks"
    if device_share >= SATURATED:
        return "device"
    if process_share >= SATURATED:
        return in_processes
    shares: dict[Step, float] = {
        "reading": measures.reading_s / measures.ready_s,
        "publishing": measures.publishing_s / measures.ready_s,
        "device": device_share,
        in_processes: process_share,
    }
    step = max(shares, key=shares.__getitem__)
    return step if shares[step] >= LEAST_SHARE else None


def pace_text(measures: Measures, workers: int) -> str:
    """Return how busy the device was and, where that is known, what sets the pace, for display.

    Args:
        measures: of the time that is judged.
        workers: workers that are ready.
    """
    busy = f"device busy {as_share(measures.device_busy_share)}"
    step = pace_setter(measures)
    return busy if step is None else f"{busy}, pace set by {_described(step, measures, max(1, workers))}"


def _described(step: Step, measures: Measures, workers: int) -> str:
    match step:
        case "reading":
            waiting = measures.reading_s / measures.ready_s * workers
            return f"reading ({waiting:.1f} shards waiting for their bytes on average)"
        case "publishing":
            published = measures.publishing_s / measures.ready_s * workers
            return f"publishing ({published:.1f} shards being published on average)"
        case "decoding" | "masks":
            processes = round(measures.sample_process_s / measures.ready_s * workers)
            return f"{step} ({processes:,} processes, {as_share(measures.sample_process_busy_share)} busy)"
        case "device":
            return "the device"
