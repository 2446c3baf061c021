"""What is done with a sample on its way through a stream, and how many may be under way."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Raw = TypeVar("Raw")
Prepared = TypeVar("Prepared")
Explained = TypeVar("Explained")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Stages(Generic[Raw, Prepared, Explained, Outcome]):
    """What is done with a sample on its way; `explain` alone runs on the device.

    Attributes:
        size_bytes: of a sample as read.
        prepare: on any of several threads.
        shape: samples of equal shape may share a batch; None: nothing to explain.
        explain: one result for each sample of a batch, in order.
        finish: on any of several threads; gets None where there was nothing to explain.
    """

    size_bytes: Callable[[Raw], int]
    prepare: Callable[[Raw], Prepared]
    shape: Callable[[Prepared], Hashable | None]
    explain: Callable[[Sequence[Prepared]], Sequence[Explained]]
    finish: Callable[[Prepared, Explained | None], Outcome]


@dataclass(frozen=True)
class StreamLimits:
    """How far reading may run ahead of writing, and what else bounds a stream.

    Attributes:
        threads: that prepare and finish.
        device_threads: batches on the device at a time.
        max_samples: held at a time, from read to written.
        max_bytes: of the samples held, as they were read; a larger sample is held alone.
        max_readers: shards that are read at a time, before others are asked for.
        max_wait_s: the longest that a sample waits for others of its shape while the device is free.
    """

    threads: int
    max_samples: int
    device_threads: int = 1
    max_bytes: int = 512 << 20
    max_readers: int = 8
    max_wait_s: float = 5.0
