"""One stream of batches for all shards in flight.

The thread of a shard reads it, a chunk of samples at a time, and waits until the last of them is written. In
between, the chunks of all shards share the threads that prepare and finish them, the limits on samples and
bytes in flight, and the batches. Threads pass on whole chunks; limits and counts are of samples.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from operator import itemgetter
from typing import Generic, cast

from pipeline.annotate.chunks import Chunk, Place, Source, chunks_read, parts_of_batch
from pipeline.annotate.queues import TaskPool, WaitingSamples, started_threads
from pipeline.annotate.stream_steps import (
    Explained,
    Outcome,
    Prepared,
    Raw,
    SampleSteps,
    StreamLimits,
    one_each,
)

FINISH, PREPARE = 0, 1
CLOSED = "the stream of samples was closed"


class BatchStream(Generic[Raw, Prepared, Explained, Outcome]):
    """Takes the samples of several shards through its steps; a batch may hold samples of several shards.

    A batch goes to the device when it is full, when nothing could join it before the device has worked, or
    when a sample has waited too long. A batch that fails is tried again shard by shard, so that only
    the shard with the faulty sample fails.

    Args:
        steps: what is done with samples.
        limits: see `StreamLimits`.
        batch_limit: most samples of a shape in one batch; called before every batch.
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
        self._waiting = WaitingSamples[Place[Prepared, Outcome]](batch_limit, limits.max_wait_s)
        self._sources: set[Source[Prepared, Outcome]] = set()
        self._readers = 0
        self._wanted_readers = min(2, limits.max_readers)
        self._blocked_readers: deque[Source[Prepared, Outcome]] = deque()
        self._samples_in_flight = 0
        self._bytes_in_flight = 0
        self._explained_bytes = 0
        self._preparing = 0
        self._on_device = 0
        self._finishing = 0
        self._has_served_a_batch = False
        self._is_closed = False
        self._pool = TaskPool(limits.threads)
        self._device_threads = started_threads("device", limits.device_threads, self._serve_device)

    def run(
        self, samples: Iterable[Raw], sink: Callable[[Sequence[Outcome]], None], key: Hashable = None
    ) -> None:
        """Take the samples of a shard through the steps; the calling thread reads them.

        Args:
            samples: read as fast as there is room for them.
            sink: called with the outcomes of every chunk, ordered by their first samples; chunk after chunk,
                one at a time, by any thread; never after this method has returned.
            key: names the shard in a call of `fail`.

        Raises:
            Exception: whatever reading, a step or the sink raised for this shard.
        """
        source: Source[Prepared, Outcome] = Source(key, sink, threading.Condition(self._lock))
        try:
            with self._reading(source), closing(chunks_read(samples, self._steps, self._limits)) as chunks:
                for raws, sizes_bytes in chunks:
                    chunk = self._admitted(source, sizes_bytes)
                    self._pool.submit(PREPARE, partial(self._prepare, chunk, raws))
            self._wait_until_written(source)
        except BaseException as error:
            self._fail(source, error)
            raise
        finally:
            self._leave(source)

    def fail(self, key: Hashable, error: BaseException) -> None:
        """Make the shards of a key fail; what they held is free at once, though a step may not return.

        Args:
            key: as given to `run`; shards that are not in the stream are not affected.
            error: is raised by `run`, once reading has returned.
        """
        with self._lock:
            for source in self._sources:
                if source.key == key:
                    self._fail(source, error)

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
    def _reading(self, source: Source[Prepared, Outcome]) -> Iterator[None]:
        with self._lock:
            if self._is_closed:
                raise RuntimeError(CLOSED)
            self._sources.add(source)
            source.is_reading = True
            self._readers += 1
        try:
            yield
        finally:
            self._stop_reading(source)

    def _stop_reading(self, source: Source[Prepared, Outcome]) -> None:
        with self._lock:
            if source.is_reading:
                source.is_reading = False
                self._readers -= 1
                self._room_for_shard.notify_all()
                self._work_for_device.notify()

    def _admitted(
        self, source: Source[Prepared, Outcome], sizes_bytes: list[int]
    ) -> Chunk[Prepared, Outcome]:
        samples, size_bytes = len(sizes_bytes), sum(sizes_bytes)
        with self._lock:
            self._blocked_readers.append(source)
            try:
                # readers take turns, so that no connection is idle for long
                while source.error is None and not (
                    self._blocked_readers[0] is source and self._has_room(samples, size_bytes)
                ):
                    self._work_for_device.notify()
                    source.changed.wait()
            finally:
                self._blocked_readers.remove(source)
                self._wake_reader()
            if source.error is not None:
                raise source.error
            chunk = Chunk(source, source.read, sizes_bytes)
            source.read += 1
            source.samples_in_flight += samples
            self._samples_in_flight += samples
            self._hold(source, size_bytes)
            source.preparing += 1
            self._preparing += 1
            return chunk

    def _has_room(self, samples: int, size_bytes: int) -> bool:
        held_bytes = self._bytes_in_flight + self._explained_bytes
        return not self._samples_in_flight or (
            held_bytes + size_bytes <= self._limits.max_bytes
            and self._samples_in_flight + samples <= self._limits.max_samples
        )

    def _hold(self, source: Source[Prepared, Outcome], size_bytes: int) -> None:
        source.bytes_in_flight += size_bytes
        self._bytes_in_flight += size_bytes

    def _hold_explained(self, source: Source[Prepared, Outcome], size_bytes: int) -> None:
        source.explained_bytes += size_bytes
        self._explained_bytes += size_bytes

    def _wake_reader(self) -> None:
        if self._blocked_readers:
            self._blocked_readers[0].changed.notify_all()
        else:
            self._room_for_shard.notify_all()

    def _wait_until_written(self, source: Source[Prepared, Outcome]) -> None:
        with self._lock:
            source.changed.wait_for(lambda: source.error is not None or source.written == source.read)
            if source.error is not None:
                raise source.error

    def _leave(self, source: Source[Prepared, Outcome]) -> None:
        with self._lock:
            source.changed.wait_for(lambda: not source.is_writing)
            self._sources.discard(source)

    def _prepare(self, chunk: Chunk[Prepared, Outcome], raws: Sequence[Raw]) -> None:
        source = chunk.source
        try:
            if source.error is None:
                chunk.prepared = list(one_each(self._steps.prepare(raws), raws, "prepared"))
        except BaseException as error:
            self._fail(source, error)
        with self._lock:
            if source.error is None:
                source.preparing -= 1
                self._preparing -= 1
                self._measure_again(chunk)
                source.prepared[chunk.number] = chunk
            complete = self._pass_on(source)
            self._work_for_device.notify()
        for done in complete:
            self._write(done)
            self._count_finished(source)

    def _measure_again(self, chunk: Chunk[Prepared, Outcome]) -> None:
        """Replace the largest possible size of prepared samples by their real size."""
        measure = self._steps.prepared_bytes
        if measure is None:
            return
        held_bytes = sum(chunk.sizes_bytes)
        chunk.sizes_bytes = [
            0
            if self._steps.shape(cast("Prepared | Outcome", item)) is None
            else measure(cast(Prepared, item))
            for item in chunk.prepared
        ]
        self._hold(chunk.source, sum(chunk.sizes_bytes) - held_bytes)
        self._wake_reader()

    def _pass_on(self, source: Source[Prepared, Outcome]) -> list[Chunk[Prepared, Outcome]]:
        """Queue prepared samples for the device in the order of their shard; return chunks that need none."""
        complete = []
        now_s = time.monotonic()
        while (chunk := source.prepared.pop(source.batched, None)) is not None:
            source.batched += 1
            for position, item in enumerate(chunk.prepared):
                shape = self._steps.shape(cast("Prepared | Outcome", item))
                if shape is None:
                    chunk.outcomes.append((position, cast(Outcome, item)))
                    self._release(chunk, position)
                else:
                    chunk.unfinished += 1
                    self._waiting.add(shape, (chunk, position), now_s)
            if not chunk.unfinished:
                self._count_finishing(source)
                complete.append(chunk)
        return complete

    def _release(self, chunk: Chunk[Prepared, Outcome], position: int) -> None:
        """Drop a prepared sample, and no longer count its bytes."""
        chunk.prepared[position] = None
        if chunk.source.error is None:
            self._hold(chunk.source, -chunk.sizes_bytes[position])

    def _finish(
        self,
        chunk: Chunk[Prepared, Outcome],
        first: int,
        explained: list[Explained],
        size_bytes: int,
    ) -> None:
        source, samples = chunk.source, len(explained)
        try:
            if source.error is None:
                outcome = self._steps.finish(explained)
                explained.clear()
                if self._is_complete(chunk, first, samples, outcome, size_bytes):
                    self._write(chunk)
        except BaseException as error:
            self._fail(source, error)
        self._count_finished(source)

    def _is_complete(
        self,
        chunk: Chunk[Prepared, Outcome],
        first: int,
        samples: int,
        outcome: Outcome,
        size_bytes: int,
    ) -> bool:
        with self._lock:
            if chunk.source.error is None:
                self._hold_explained(chunk.source, -size_bytes)
                self._wake_reader()
            chunk.outcomes.append((first, outcome))
            chunk.unfinished -= samples
            return not chunk.unfinished

    def _count_finishing(self, source: Source[Prepared, Outcome]) -> None:
        source.finishing += 1
        self._finishing += 1

    def _count_finished(self, source: Source[Prepared, Outcome]) -> None:
        with self._lock:
            if source.error is None:
                source.finishing -= 1
                self._finishing -= 1
            self._work_for_device.notify()

    def _write(self, chunk: Chunk[Prepared, Outcome]) -> None:
        """Pass the next chunks of a shard to its sink; a thread that does so already takes this one too."""
        source = chunk.source
        with self._lock:
            if source.error is not None:
                return
            source.complete[chunk.number] = chunk
            if source.is_writing:
                return
            source.is_writing = True
        while (following := self._next_to_write(source)) is not None:
            try:
                source.sink([outcome for _, outcome in sorted(following.outcomes, key=itemgetter(0))])
            except BaseException as error:
                self._fail(source, error)
            with self._lock:
                self._count_written(following)

    def _next_to_write(self, source: Source[Prepared, Outcome]) -> Chunk[Prepared, Outcome] | None:
        with self._lock:
            chunk = source.complete.pop(source.written, None)
            if chunk is None:
                source.is_writing = False
                source.changed.notify_all()
            return chunk

    def _count_written(self, chunk: Chunk[Prepared, Outcome]) -> None:
        source, samples = chunk.source, len(chunk.sizes_bytes)
        source.written += 1
        if source.error is not None:
            return
        source.samples_in_flight -= samples
        self._samples_in_flight -= samples
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

    def _next_batch(self) -> list[Place[Prepared, Outcome]]:
        """Wait for a batch; empty where the stream was closed."""
        may_want_readers = self._has_served_a_batch
        with self._lock:
            while not self._is_closed:
                now_s = time.monotonic()
                batch = self._batch(now_s)
                if batch:
                    self._has_served_a_batch = True
                    self._on_device += 1
                    if self._waiting:
                        # there may be enough samples for another batch
                        self._work_for_device.notify()
                    return batch
                if may_want_readers and self._waits_for_readers():
                    may_want_readers = False
                    self._wanted_readers = min(self._wanted_readers + 1, self._limits.max_readers)
                    self._room_for_shard.notify_all()
                self._work_for_device.wait(self._waiting.longest_wait_s(now_s))
        return []

    def _batch(self, now_s: float) -> list[Place[Prepared, Outcome]]:
        masks_are_behind = self._finishing and self._explained_bytes > self._limits.max_bytes // 2
        return [] if masks_are_behind else self._waiting.take(now_s, flush=self._nothing_can_join())

    def _nothing_can_join(self) -> bool:
        if self._preparing:
            return False
        if self._blocked_readers:
            # they continue once samples are written, which may need the device first
            return not self._finishing and not self._on_device
        return not self._readers

    def _waits_for_readers(self) -> bool:
        is_read_ahead = self._preparing or self._blocked_readers or self._on_device
        return not is_read_ahead and self._readers >= self._wanted_readers

    def _explain(self, batch: Sequence[Place[Prepared, Outcome]]) -> None:
        try:
            prepared = [cast(Prepared, chunk.prepared[position]) for chunk, position in batch]
            explained = list(one_each(self._steps.explain(prepared), prepared, "explained"))
            del prepared
            parts = list(
                parts_of_batch(batch, explained, self._steps.explained_bytes, self._limits.part_bytes)
            )
            del explained
        except BaseException as error:
            self._explain_apart(batch, error)
            return
        with self._lock:
            for chunk, position in batch:
                self._release(chunk, position)
            for chunk, _first_position, _part, size_bytes in parts:
                if chunk.source.error is None:
                    self._count_finishing(chunk.source)
                    self._hold_explained(chunk.source, size_bytes)
            self._wake_reader()
        for chunk, first, part, size_bytes in parts:
            self._pool.submit(FINISH, partial(self._finish, chunk, first, part, size_bytes))

    def _explain_apart(self, batch: Sequence[Place[Prepared, Outcome]], error: BaseException) -> None:
        """Try the batch again shard by shard, so that only the shard at fault fails."""
        sources = list(dict.fromkeys(chunk.source for chunk, _ in batch))
        if len(sources) == 1:
            self._fail(sources[0], error)
            return
        for source in sources:
            self._explain([place for place in batch if place[0].source is source])

    def _fail(self, source: Source[Prepared, Outcome], error: BaseException) -> None:
        with self._lock:
            if source.error is not None:
                return
            source.error = error
            # a thread that works for it may never return, and must not keep other shards waiting
            self._stop_reading(source)
            self._preparing -= source.preparing
            self._finishing -= source.finishing
            self._samples_in_flight -= source.samples_in_flight
            self._bytes_in_flight -= source.bytes_in_flight
            self._explained_bytes -= source.explained_bytes
            source.prepared.clear()
            source.complete.clear()
            self._waiting.discard(lambda place: place[0].source is source)
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
