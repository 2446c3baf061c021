"""The steps that a stream takes samples through, and its limits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Raw = TypeVar("Raw")
Prepared = TypeVar("Prepared")
Explained = TypeVar("Explained")
Outcome = TypeVar("Outcome")
Item = TypeVar("Item")


def _nothing(_item: object) -> int:
    return 0


def _ignored(_seconds: float) -> None:
    pass


@dataclass(frozen=True)
class SampleSteps(Generic[Raw, Prepared, Explained, Outcome]):
    """What is done with samples on their way; `explain` alone runs on the device.

    Attributes:
        size_bytes: bytes that a sample takes at most, from when it was read until the device has it.
        prepare: makes samples of one shard ready for the device; for a sample that needs no explanation it
            returns the outcome instead. Called by several threads.
        shape: of what `prepare` returned; samples of equal shape may share a batch. None: it is an outcome.
        explain: returns one result for each sample of a batch, in order.
        finish: turns results of one shard into one outcome; called by several threads.
        explained_bytes: bytes that a result takes until it is finished.
        was_reading_s: called with the seconds that the reading of a chunk took.
    """

    size_bytes: Callable[[Raw], int]
    prepare: Callable[[Sequence[Raw]], Sequence[Prepared | Outcome]]
    shape: Callable[[Prepared | Outcome], Hashable | None]
    explain: Callable[[Sequence[Prepared]], Sequence[Explained]]
    finish: Callable[[Sequence[Explained]], Outcome]
    prepared_bytes: Callable[[Prepared], int] | None = None
    explained_bytes: Callable[[Explained], int] = _nothing
    was_reading_s: Callable[[float], None] = _ignored


@dataclass(frozen=True)
class StreamLimits:
    """How far reading may run ahead of writing, and other limits of a stream.

    Attributes:
        threads: number of threads that prepare and finish samples.
        max_samples: samples in flight, from read to written.
        device_threads: batches on the device at a time.
        max_bytes: memory of the samples in flight: as read, prepared or explained, whichever they are. A
            larger sample is alone. Half of it may be explained samples; the device waits for their masks.
        max_readers: most shards that are asked for at a time because the device has run dry.
        max_wait_s: longest time that a sample waits for others of its shape while the device is free.
        chunk_samples: samples of a chunk, at most; a chunk takes a sixteenth of `max_bytes` at most.
        part_bytes: explained samples that are finished together take no more.
    """

    threads: int
    max_samples: int
    device_threads: int = 1
    max_bytes: int = 512 << 20
    max_readers: int = 8
    max_wait_s: float = 5.0
    chunk_samples: int = 32
    part_bytes: int = 32 << 20


def one_each(results: Sequence[Item], samples: Sequence[object], what: str) -> Sequence[Item]:
    """Return the results of a step; raise ValueError where it did not return one for each sample."""
    if len(results) != len(samples):
        raise ValueError(f"expected {len(samples)} {what} samples, received {len(results)}")
    return results
