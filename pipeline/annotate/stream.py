"""One stream of batches for all shards in flight.

The thread of a shard reads it, and waits until the last of its samples is written. In between, the samples of
all shards share the threads that prepare and finish them, the limits on samples in flight, and the batches.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar, cast

from pipeline.annotate.queues import TaskPool, WaitingSamples, started_threads

FINISH, PREPARE = 0, 1
CLOSED = "the stream of samples was closed"

Raw = TypeVar("Raw")
Prepared = TypeVar("Prepared")
Explained = TypeVar("Explained")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class SampleSteps(Generic[Raw, Prepared, Explained, Outcome]):
    """What is done with a sample on its way; `explain` alone runs on the device.

    Attributes:
        size_bytes: bytes that a sample takes at most, from when it was read until it is written.
        prepare: makes a sample ready for the device, or returns its outcome where nothing is to be explained;
            called by several threads.
        shape: of what `prepare` returned; samples of equal shape may share a batch. None: it is the outcome.
        explain: returns one result for each sample of a batch, in order.
        finish: turns a result into the outcome; called by several threads.
    """

    size_bytes: Callable[[Raw], int]
    prepare: Callable[[Raw], Prepared | Outcome]
    shape: Callable[[Prepared | Outcome], Hashable | None]
    explain: Callable[[Sequence[Prepared]], Sequence[Explained]]
    finish: Callable[[Explained], Outcome]


@dataclass(frozen=True)
class StreamLimits:
    """How far reading may run ahead of writing, and other limits of a stream.

    Attributes:
        threads: number of threads that prepare and finish samples.
        max_samples: samples in flight, from read to written.
        device_threads: batches on the device at a time.
        max_bytes: sum of `SampleSteps.size_bytes` of the samples in flight; a larger sample is alone.
        max_readers: most shards that are asked for at a time because the device has run dry.
        max_wait_s: longest time that a sample waits for others of its shape while the device is free.
    """

    threads: int
    max_samples: int
    device_threads: int = 1
    max_bytes: int = 512 << 20
    max_readers: int = 8
    max_wait_s: float = 5.0


@dataclass(eq=False)
class _Source(Generic[Prepared, Outcome]):
    """A shard in flight: how much of it was read, and how much of that is written."""

    sink: Callable[[Outcome], None]
    changed: threading.Condition
    read: int = 0
    batched: int = 0
    written: int = 0
    bytes_in_flight: int = 0
    prepared: dict[int, _InFlight[Prepared, Outcome]] = field(default_factory=dict)
    outcomes: dict[int, tuple[int, Outcome]] = field(default_factory=dict)
    is_writing: bool = False
    error: BaseException | None = None


@dataclass(eq=False)
class _InFlight(Generic[Prepared, Outcome]):
    """The place of a sample in its shard, and the sample once prepared, until the device has explained it."""

    source: _Source[Prepared, Outcome]
    position: int
    size_bytes: int
    prepared: Prepared | Outcome | None = None


class BatchStream(Generic[Raw, Prepared, Explained, Outcome]):
    """Takes samples of several shards through its steps, in batches that cross the shards' boundaries.

    A batch goes to the device when it is full, when nothing could join it before the device has worked, or
    when a sample has waited too long. A batch that fails is tried again shard by shard, so that a sample at
    fault fails its own shard alone.

    Args:
        steps: what is done with a sample.
        limits: see `StreamLimits`.
        batch_limit: most samples of a shape in one batch; asked anew for every batch.
    """

    def __init__(
        self,
        steps: SampleSteps[Raw, Prepared, Explained, Outcome],
        limits: StreamLimits,
        batch_limit: Callable[[Hashable], int],
    ) -> None:
        self._steps = steps
        self._limits = limits
        self._lock = threading.RLock()
        self._work_for_device = threading.Condition(self._lock)
        self._room_for_shard = threading.Condition(self._lock)
        self._waiting = WaitingSamples[_InFlight[Prepared, Outcome]](batch_limit, limits.max_wait_s)
        self._sources: set[_Source[Prepared, Outcome]] = set()
        self._readers = 0
        self._wanted_readers = min(2, limits.max_readers)
        self._blocked_readers: deque[_Source[Prepared, Outcome]] = deque()
        self._samples_in_flight = 0
        self._bytes_in_flight = 0
        self._preparing = 0
        self._on_device = 0
        self._finishing = 0
        self._has_served_a_batch = False
        self._is_closed = False
        self._pool = TaskPool(limits.threads)
        self._device_threads = started_threads("device", limits.device_threads, self._serve_device)

    def run(self, samples: Iterable[Raw], sink: Callable[[Outcome], None]) -> None:
        """Take the samples of a shard through the steps; the calling thread reads them.

        Args:
            samples: read as fast as there is room for them.
            sink: called with the outcome of every sample, in order, one at a time, by any thread; never after
                this method has returned.

        Raises:
            Exception: whatever reading, a step or the sink raised for this shard.
        """
        source: _Source[Prepared, Outcome] = _Source(sink, threading.Condition(self._lock))
        try:
            with self._reading(source), closing(_as_generator(samples)) as items:
                for raw in items:
                    sample = self._admitted(source, self._steps.size_bytes(raw))
                    self._pool.submit(PREPARE, partial(self._prepare, sample, raw))
            self._wait_until_written(source)
        except BaseException as error:
            self._fail(source, error)
            raise
        finally:
            self._leave(source)

    def wait_for_room(self) -> None:
        """Wait until one more shard would be read at once: two at first, more once the device has run dry."""
        with self._lock:
            while not self._is_closed and (self._blocked_readers or self._readers >= self._wanted_readers):
                self._room_for_shard.wait()

    def close(self) -> None:
        """Stop the threads; shards that are still in flight fail."""
        self._close(RuntimeError(CLOSED))
        for thread in self._device_threads:
            thread.join()
        self._pool.close()

    @contextmanager
    def _reading(self, source: _Source[Prepared, Outcome]) -> Iterator[None]:
        with self._lock:
            if self._is_closed:
                raise RuntimeError(CLOSED)
            self._sources.add(source)
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1
                self._room_for_shard.notify_all()
                self._work_for_device.notify()

    def _admitted(self, source: _Source[Prepared, Outcome], size_bytes: int) -> _InFlight[Prepared, Outcome]:
        with self._lock:
            self._blocked_readers.append(source)
            try:
                # readers take turns, so that no connection is idle for long
                while source.error is None and not (
                    self._blocked_readers[0] is source and self._has_room(size_bytes)
                ):
                    self._work_for_device.notify()
                    source.changed.wait()
            finally:
                self._blocked_readers.remove(source)
                self._wake_reader()
            if source.error is not None:
                raise source.error
            sample = _InFlight(source, source.read, size_bytes)
            source.read += 1
            source.bytes_in_flight += size_bytes
            self._samples_in_flight += 1
            self._bytes_in_flight += size_bytes
            self._preparing += 1
            return sample

    def _has_room(self, size_bytes: int) -> bool:
        has_bytes = self._bytes_in_flight + size_bytes <= self._limits.max_bytes
        return not self._samples_in_flight or (
            has_bytes and self._samples_in_flight < self._limits.max_samples
        )

    def _wake_reader(self) -> None:
        if self._blocked_readers:
            self._blocked_readers[0].changed.notify_all()
        else:
            self._room_for_shard.notify_all()

    def _wait_until_written(self, source: _Source[Prepared, Outcome]) -> None:
        with self._lock:
            source.changed.wait_for(lambda: source.error is not None or source.written == source.read)
            if source.error is not None:
                raise source.error

    def _leave(self, source: _Source[Prepared, Outcome]) -> None:
        with self._lock:
            source.changed.wait_for(lambda: not source.is_writing)
            self._sources.discard(source)

    def _prepare(self, sample: _InFlight[Prepared, Outcome], raw: Raw) -> None:
        source = sample.source
        try:
            if source.error is None:
                sample.prepared = self._steps.prepare(raw)
        except BaseException as error:
            self._fail(source, error)
        with self._lock:
            self._preparing -= 1
            if source.error is None:
                source.prepared[sample.position] = sample
            done = self._pass_on(source)
            self._work_for_device.notify()
        for outcome in done:
            self._write(outcome, cast(Outcome, outcome.prepared))
            self._count_finished()

    def _pass_on(self, source: _Source[Prepared, Outcome]) -> list[_InFlight[Prepared, Outcome]]:
        """Queue prepared samples for the device in the order of their shard; return those that need none."""
        done = []
        while (sample := source.prepared.pop(source.batched, None)) is not None:
            source.batched += 1
            shape = self._steps.shape(cast("Prepared | Outcome", sample.prepared))
            if shape is None:
                self._finishing += 1
                done.append(sample)
            else:
                self._waiting.add(shape, sample, time.monotonic())
        return done

    def _finish(self, sample: _InFlight[Prepared, Outcome], explained: Explained) -> None:
        source = sample.source
        try:
            if source.error is None:
                self._write(sample, self._steps.finish(explained))
        except BaseException as error:
            self._fail(source, error)
        self._count_finished()

    def _count_finished(self) -> None:
        with self._lock:
            self._finishing -= 1
            self._work_for_device.notify()

    def _write(self, sample: _InFlight[Prepared, Outcome], outcome: Outcome) -> None:
        """Pass the next outcomes of a shard to its sink; a thread that does so already takes this one too."""
        source = sample.source
        with self._lock:
            if source.error is not None:
                return
            source.outcomes[sample.position] = (sample.size_bytes, outcome)
            if source.is_writing:
                return
            source.is_writing = True
        while (entry := self._next_to_write(source)) is not None:
            size_bytes, next_outcome = entry
            try:
                source.sink(next_outcome)
            except BaseException as error:
                self._fail(source, error)
            with self._lock:
                self._count_written(source, size_bytes)

    def _next_to_write(self, source: _Source[Prepared, Outcome]) -> tuple[int, Outcome] | None:
        with self._lock:
            entry = source.outcomes.pop(source.written, None)
            if entry is None:
                source.is_writing = False
                source.changed.notify_all()
            return entry

    def _count_written(self, source: _Source[Prepared, Outcome], size_bytes: int) -> None:
        source.written += 1
        if source.error is not None:
            return
        source.bytes_in_flight -= size_bytes
        self._samples_in_flight -= 1
        self._bytes_in_flight -= size_bytes
        self._wake_reader()

    def _serve_device(self) -> None:
        try:
            while batch := self._next_batch():
                self._explain(batch)
                with self._lock:
                    self._on_device -= 1
                    self._work_for_device.notify_all()
        except BaseException as error:
            self._close(error)

    def _next_batch(self) -> list[_InFlight[Prepared, Outcome]]:
        """Wait for a batch; empty where the stream was closed."""
        may_want_readers = self._has_served_a_batch
        with self._lock:
            while not self._is_closed:
                now_s = time.monotonic()
                batch = self._waiting.take(now_s, flush=self._nothing_can_join())
                if batch:
                    self._has_served_a_batch = True
                    self._on_device += 1
                    return batch
                if may_want_readers and self._waits_for_readers():
                    may_want_readers = False
                    self._wanted_readers = min(self._wanted_readers + 1, self._limits.max_readers)
                    self._room_for_shard.notify_all()
                self._work_for_device.wait(self._waiting.longest_wait_s(now_s))
        return []

    def _nothing_can_join(self) -> bool:
        if self._preparing:
            return False
        if self._blocked_readers:
            # they continue when something is written: soon, or only once the device has worked
            return not self._finishing and not self._on_device
        return not self._readers

    def _waits_for_readers(self) -> bool:
        is_read_ahead = self._preparing or self._blocked_readers or self._on_device
        return not is_read_ahead and self._readers >= self._wanted_readers

    def _explain(self, batch: Sequence[_InFlight[Prepared, Outcome]]) -> None:
        try:
            explained = list(self._steps.explain([cast(Prepared, sample.prepared) for sample in batch]))
            if len(explained) != len(batch):
                raise ValueError(f"expected {len(batch)} explained samples, received {len(explained)}")
        except BaseException as error:
            self._explain_apart(batch, error)
            return
        with self._lock:
            self._finishing += len(batch)
        for sample, result in zip(batch, explained, strict=True):
            sample.prepared = None  # its pixels; until here a batch that failed could be tried again
            self._pool.submit(FINISH, partial(self._finish, sample, result))

    def _explain_apart(self, batch: Sequence[_InFlight[Prepared, Outcome]], error: BaseException) -> None:
        """Try the batch again shard by shard, so that only the shard at fault fails."""
        sources = list(dict.fromkeys(sample.source for sample in batch))
        if len(sources) == 1:
            self._fail(sources[0], error)
            return
        for source in sources:
            self._explain([sample for sample in batch if sample.source is source])

    def _fail(self, source: _Source[Prepared, Outcome], error: BaseException) -> None:
        with self._lock:
            if source.error is not None:
                return
            source.error = error
            self._samples_in_flight -= source.read - source.written
            self._bytes_in_flight -= source.bytes_in_flight
            source.prepared.clear()
            source.outcomes.clear()
            self._waiting.discard(lambda sample: sample.source is source)
            source.changed.notify_all()
            self._wake_reader()
            self._work_for_device.notify()

    def _close(self, error: BaseException) -> None:
        with self._lock:
            self._is_closed = True
            for source in self._sources:
                self._fail(source, error)
            self._work_for_device.notify_all()
            self._room_for_shard.notify_all()


def _as_generator(samples: Iterable[Raw]) -> Generator[Raw, None, None]:
    yield from samples
