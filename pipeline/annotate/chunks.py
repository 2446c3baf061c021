"""Chunks of consecutive samples of a shard: how they are read, and what is kept of them on their way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Generic

from pipeline.annotate.stream_steps import Explained, Outcome, Prepared, Raw, SampleSteps, StreamLimits

# a slow shard's samples are passed on after so many seconds, though they are no full chunk yet
CHUNK_S = 1.0


@dataclass(eq=False)
class Source(Generic[Prepared, Outcome]):
    """A shard in flight: how many of its chunks were read, and how many of these are written.

    What it holds and what is being done for it counts towards the stream's own sums until it fails.
    """

    key: Hashable
    sink: Callable[[Sequence[Outcome]], None]
    changed: threading.Condition
    is_reading: bool = False
    read: int = 0
    batched: int = 0
    written: int = 0
    samples_in_flight: int = 0
    bytes_in_flight: int = 0
    explained_bytes: int = 0
    preparing: int = 0
    finishing: int = 0
    prepared: dict[int, Chunk[Prepared, Outcome]] = field(default_factory=dict)
    complete: dict[int, Chunk[Prepared, Outcome]] = field(default_factory=dict)
    is_writing: bool = False
    error: BaseException | None = None


@dataclass(eq=False)
class Chunk(Generic[Prepared, Outcome]):
    """Consecutive samples of a shard.

    Attributes:
        source: the shard.
        number: ordinal of the chunk in its shard.
        sizes_bytes: of each sample, until the device has it.
        prepared: each sample, until it is explained; or its outcome.
        outcomes: of its samples so far, with the position of the first one.
        unfinished: samples without an outcome.
    """

    source: Source[Prepared, Outcome]
    number: int
    sizes_bytes: list[int]
    prepared: list[Prepared | Outcome | None] = field(default_factory=list)
    outcomes: list[tuple[int, Outcome]] = field(default_factory=list)
    unfinished: int = 0


@dataclass(eq=False)
class Reading(Generic[Raw]):
    """A chunk that is being read: its samples, their sizes, and since when."""

    raws: list[Raw] = field(default_factory=list)
    sizes_bytes: list[int] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)


# a sample that waits for the device: its chunk, and its position there
Place = tuple[Chunk[Prepared, Outcome], int]


def chunks_read(
    samples: Iterable[Raw], steps: SampleSteps[Raw, Any, Any, Any], limits: StreamLimits
) -> Generator[tuple[list[Raw], list[int]], None, None]:
    """Yield consecutive samples, and the size of each in bytes; the time between two yields is reading.

    Args:
        samples: of one shard.
        steps: measure samples, and receive the time that reading took.
        limits: bound the samples and bytes of a chunk.
    """
    most_samples = min(limits.chunk_samples, limits.max_samples)
    most_bytes = limits.max_bytes // 16
    chunk = Reading[Raw]()
    with closing(_as_generator(samples)) as items:
        for raw in items:
            size_bytes = steps.size_bytes(raw)
            if chunk.raws and sum(chunk.sizes_bytes) + size_bytes > most_bytes:
                yield _read(chunk, steps)
                chunk = Reading()
            chunk.raws.append(raw)
            chunk.sizes_bytes.append(size_bytes)
            if len(chunk.raws) == most_samples or time.monotonic() - chunk.started_s > CHUNK_S:
                yield _read(chunk, steps)
                chunk = Reading()
    if chunk.raws:
        yield _read(chunk, steps)


def _read(chunk: Reading[Raw], steps: SampleSteps[Raw, Any, Any, Any]) -> tuple[list[Raw], list[int]]:
    steps.was_reading_s(time.monotonic() - chunk.started_s)
    return chunk.raws, chunk.sizes_bytes


def _as_generator(samples: Iterable[Raw]) -> Generator[Raw, None, None]:
    yield from samples


def parts_of_batch(
    batch: Sequence[Place[Prepared, Outcome]],
    explained: Sequence[Explained],
    explained_bytes: Callable[[Explained], int],
    part_bytes: int,
) -> Iterator[tuple[Chunk[Prepared, Outcome], int, list[Explained], int]]:
    """Share the results of a batch out to its chunks: each with the position of the first, and the bytes.

    Args:
        batch: places of its samples.
        explained: the result for each of them.
        explained_bytes: bytes that a result takes.
        part_bytes: results that are finished together take no more, unless it is a single one.
    """
    by_chunk: dict[Chunk[Prepared, Outcome], list[tuple[int, Explained]]] = {}
    for (chunk, position), result in zip(batch, explained, strict=True):
        by_chunk.setdefault(chunk, []).append((position, result))
    for chunk, results in by_chunk.items():
        part: list[Explained] = []
        first, held_bytes = results[0][0], 0
        for position, result in results:
            size_bytes = explained_bytes(result)
            if part and held_bytes + size_bytes > part_bytes:
                yield chunk, first, part, held_bytes
                part, first, held_bytes = [], position, 0
            part.append(result)
            held_bytes += size_bytes
        yield chunk, first, part, held_bytes
