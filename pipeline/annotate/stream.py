"""One stream of batches for all shards in hand: threads prepare, few work the device, threads finish.

A shard's own thread reads it and waits until the last of its samples is written. In between, samples of all
shards share the threads that decode and encode, the room for what is held at a time, and the batches.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, cast

from pipeline.annotate.batching import WaitingSamples
from pipeline.annotate.stages import Explained, Outcome, Prepared, Raw, Stages, StreamLimits
from pipeline.annotate.task_pool import TaskPool

FINISH, PREPARE = 0, 1
CLOSED = "the stream of samples was closed"


@dataclass(eq=False)
class _Source(Generic[Prepared, Outcome]):
    """A shard in hand: what was read of it, and how much of that is written."""

    sink: Callable[[Outcome], None]
    changed: threading.Condition
    read: int = 0
    batched: int = 0
    written: int = 0
    held_bytes: int = 0
    prepared: dict[int, _Ticket[Prepared, Outcome]] = field(default_factory=dict)
    outcomes: dict[int, tuple[int, Outcome]] = field(default_factory=dict)
    is_writing: bool = False
    error: BaseException | None = None


@dataclass(eq=False)
class _Ticket(Generic[Prepared, Outcome]):
    """A sample under way."""

    source: _Source[Prepared, Outcome]
    position: int
    size_bytes: int
    prepared: Prepared | None = None


class BatchStream(Generic[Raw, Prepared, Explained, Outcome]):
    """Takes samples of several shards through its stages, in batches that cross the shards' boundaries.

    A batch goes to the device when it is full, when nothing could join it before the device has worked, or
    when a sample has waited too long. A batch that fails is tried again shard by shard, so that a sample at
    fault costs no other shard anything.

    Args:
        stages: what is done with a sample.
        limits: what bounds the stream.
        batch_limit: most samples of a shape in one batch; asked anew for every batch.
    """

    def __init__(
        self,
        stages: Stages[Raw, Prepared, Explained, Outcome],
        limits: StreamLimits,
        batch_limit: Callable[[Hashable], int],
    ) -> None:
        self._stages = stages
        self._limits = limits
        self._lock = threading.Lock()
        self._work_for_device = threading.Condition(self._lock)
        self._room_for_shard = threading.Condition(self._lock)
        self._waiting: WaitingSamples[_Ticket[Prepared, Outcome]] = WaitingSamples(
            batch_limit, limits.max_wait_s
        )
        self._sources: set[_Source[Prepared, Outcome]] = set()
        self._readers = 0
        self._wanted_readers = min(2, limits.max_readers)
        self._readers_held_up: deque[_Source[Prepared, Outcome]] = deque()
        self._held_samples = 0
        self._held_bytes = 0
        self._preparing = 0
        self._on_device = 0
        self._finishing = 0
        self._has_worked = False
        self._is_closed = False
        self._pool = TaskPool(limits.threads)
        self._device_threads = [
            threading.Thread(target=self._serve_device, name=f"device-{number}", daemon=True)
            for number in range(limits.device_threads)
        ]
        for thread in self._device_threads:
            thread.start()

    def run(self, samples: Iterable[Raw], sink: Callable[[Outcome], None]) -> None:
        """Take one shard's samples through the stages; the thread that calls reads them.

        Args:
            samples: read as fast as there is room for them.
            sink: is given every sample's outcome, in order, one at a time, by any thread; never after the
                return.

        Raises:
            Exception: whatever reading, a stage or the sink raised for this shard.
        """
        source: _Source[Prepared, Outcome] = _Source(sink, threading.Condition(self._lock))
        try:
            with self._reading(source), closing(_as_generator(samples)) as items:
                for raw in items:
                    ticket = self._admitted(source, self._stages.size_bytes(raw))
                    self._pool.submit(PREPARE, partial(self._prepare, ticket, raw))
            self._wait_until_written(source)
        except BaseException as error:
            self._fail(source, error)
            raise
        finally:
            self._leave(source)

    def wait_for_room(self) -> None:
        """Return when one more shard would be read at once: at first two, more if the device ran dry."""
        with self._lock:
            while not self._is_closed and (self._readers_held_up or self._readers >= self._wanted_readers):
                self._room_for_shard.wait()

    def close(self) -> None:
        """Stop the threads; shards that are still in hand fail."""
        with self._lock:
            self._close(RuntimeError(CLOSED))
        for thread in self._device_threads:
            thread.join()
        self._pool.close()

    # --- reading: on the shard's thread ---

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

    def _admitted(self, source: _Source[Prepared, Outcome], size_bytes: int) -> _Ticket[Prepared, Outcome]:
        with self._lock:
            self._readers_held_up.append(source)
            try:
                # readers take turns, so that no connection lies idle for long
                while source.error is None and not (
                    self._readers_held_up[0] is source and self._has_room(size_bytes)
                ):
                    self._work_for_device.notify()
                    source.changed.wait()
            finally:
                self._readers_held_up.remove(source)
                self._wake_reader()
            if source.error is not None:
                raise source.error
            ticket = _Ticket(source, source.read, size_bytes)
            source.read += 1
            source.held_bytes += size_bytes
            self._held_samples += 1
            self._held_bytes += size_bytes
            self._preparing += 1
            return ticket

    def _has_room(self, size_bytes: int) -> bool:
        limits = self._limits
        return not self._held_samples or (
            self._held_samples < limits.max_samples and self._held_bytes + size_bytes <= limits.max_bytes
        )

    def _wake_reader(self) -> None:
        if self._readers_held_up:
            self._readers_held_up[0].changed.notify_all()
        else:
            self._room_for_shard.notify_all()

    def _wait_until_written(self, source: _Source[Prepared, Outcome]) -> None:
        with self._lock:
            while source.error is None and source.written < source.read:
                source.changed.wait()
            if source.error is not None:
                raise source.error

    def _leave(self, source: _Source[Prepared, Outcome]) -> None:
        with self._lock:
            while source.is_writing:
                source.changed.wait()
            self._sources.discard(source)

    # --- preparing and finishing: on the pool's threads ---

    def _prepare(self, ticket: _Ticket[Prepared, Outcome], raw: Raw) -> None:
        source = ticket.source
        try:
            if source.error is None:
                ticket.prepared = self._stages.prepare(raw)
        except BaseException as error:
            self._fail(source, error)
        with self._lock:
            self._preparing -= 1
            if source.error is None:
                source.prepared[ticket.position] = ticket
            passed_on = self._pass_on(source)
            self._work_for_device.notify()
        for unexplained in passed_on:
            self._finish(unexplained, None)

    def _pass_on(self, source: _Source[Prepared, Outcome]) -> list[_Ticket[Prepared, Outcome]]:
        """Let prepared samples wait for the device, in the shard's order; those with nothing to explain."""
        unexplained = []
        while (ticket := source.prepared.pop(source.batched, None)) is not None:
            source.batched += 1
            shape = self._stages.shape(cast(Prepared, ticket.prepared))
            if shape is None:
                self._finishing += 1
                unexplained.append(ticket)
            else:
                self._waiting.add(shape, ticket, time.monotonic())
        return unexplained

    def _finish(self, ticket: _Ticket[Prepared, Outcome], explained: Explained | None) -> None:
        source = ticket.source
        try:
            if source.error is None:
                outcome = self._stages.finish(cast(Prepared, ticket.prepared), explained)
                with self._lock:
                    source.outcomes[ticket.position] = (ticket.size_bytes, outcome)
                self._write(source)
        except BaseException as error:
            self._fail(source, error)
        with self._lock:
            self._finishing -= 1
            self._work_for_device.notify()

    def _write(self, source: _Source[Prepared, Outcome]) -> None:
        """Give the sink what comes next of a shard; where a thread is at it, it takes this too."""
        with self._lock:
            if source.is_writing:
                return
            source.is_writing = True
        while (entry := self._next_to_write(source)) is not None:
            size_bytes, outcome = entry
            try:
                source.sink(outcome)
            except BaseException as error:
                self._fail(source, error)
            with self._lock:
                self._written(source, size_bytes)

    def _next_to_write(self, source: _Source[Prepared, Outcome]) -> tuple[int, Outcome] | None:
        with self._lock:
            entry = source.outcomes.pop(source.written, None)
            if entry is None:
                source.is_writing = False
                source.changed.notify_all()
            return entry

    def _written(self, source: _Source[Prepared, Outcome], size_bytes: int) -> None:
        source.written += 1
        if source.error is not None:
            return
        source.held_bytes -= size_bytes
        self._held_samples -= 1
        self._held_bytes -= size_bytes
        self._wake_reader()

    # --- the device: on threads of its own ---

    def _serve_device(self) -> None:
        try:
            while batch := self._next_batch():
                self._explain(batch)
                with self._lock:
                    self._on_device -= 1
                    self._work_for_device.notify_all()
        except BaseException as error:
            with self._lock:
                self._close(error)

    def _next_batch(self) -> list[_Ticket[Prepared, Outcome]]:
        """Wait for a batch; empty where the stream was closed."""
        may_want_readers = self._has_worked
        with self._lock:
            while not self._is_closed:
                now_s = time.monotonic()
                batch = self._waiting.take(now_s, flush=self._nothing_can_join())
                if batch:
                    self._has_worked = True
                    self._on_device += 1
                    return batch
                if may_want_readers and self._waits_for_readers():
                    may_want_readers = False
                    self._wanted_readers = min(self._wanted_readers + 1, self._limits.max_readers)
                    self._room_for_shard.notify_all()
                self._work_for_device.wait(self._waiting.patience_s(now_s))
        return []

    def _nothing_can_join(self) -> bool:
        if self._preparing:
            return False
        if self._readers_held_up:
            # they go on when something is written: soon, or only once the device has worked
            return not self._finishing and not self._on_device
        return not self._readers

    def _waits_for_readers(self) -> bool:
        is_read_ahead = self._preparing or self._readers_held_up or self._on_device
        return not is_read_ahead and self._readers >= self._wanted_readers

    def _explain(self, batch: Sequence[_Ticket[Prepared, Outcome]]) -> None:
        try:
            explained = list(self._stages.explain([cast(Prepared, ticket.prepared) for ticket in batch]))
            if len(explained) != len(batch):
                raise ValueError(f"expected {len(batch)} explained samples, received {len(explained)}")
        except BaseException as error:
            self._explain_apart(batch, error)
            return
        with self._lock:
            self._finishing += len(batch)
        for ticket, result in zip(batch, explained, strict=True):
            self._pool.submit(FINISH, partial(self._finish, ticket, result))

    def _explain_apart(self, batch: Sequence[_Ticket[Prepared, Outcome]], error: BaseException) -> None:
        """Find the shard at fault: the others of the batch go on."""
        sources = list(dict.fromkeys(ticket.source for ticket in batch))
        if len(sources) == 1:
            self._fail(sources[0], error)
            return
        for source in sources:
            self._explain([ticket for ticket in batch if ticket.source is source])

    # --- the end of a shard before its time ---

    def _fail(self, source: _Source[Prepared, Outcome], error: BaseException) -> None:
        with self._lock:
            self._stop(source, error)

    def _stop(self, source: _Source[Prepared, Outcome], error: BaseException) -> None:
        if source.error is not None:
            return
        source.error = error
        self._held_samples -= source.read - source.written
        self._held_bytes -= source.held_bytes
        source.prepared.clear()
        source.outcomes.clear()
        self._waiting.discard(lambda ticket: ticket.source is source)
        source.changed.notify_all()
        self._wake_reader()
        self._work_for_device.notify()

    def _close(self, error: BaseException) -> None:
        self._is_closed = True
        for source in self._sources:
            self._stop(source, error)
        self._work_for_device.notify_all()
        self._room_for_shard.notify_all()


def _as_generator(samples: Iterable[Raw]) -> Generator[Raw, None, None]:
    yield from samples
