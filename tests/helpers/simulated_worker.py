"""A simulated worker: the shards in flight on it share one device, as those of a real worker do."""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipeline.annotate.annotator import ShardProgress
from pipeline.output.counts import ShardCounts
from pipeline.output.measures import Measures
from pipeline.run.hosting import Place
from pipeline.run.plan import WorkerShape
from pipeline.run.worker import Heartbeat
from pipeline.storage import ShardSource

BYTES_PER_SAMPLE = 1000
ROUNDING_SAMPLES = 1e-6
READERS_AT_FIRST, MOST_READERS = 2, 8


@dataclass(frozen=True)
class WorkerTimes:
    """How long the steps of a worker take.

    Attributes:
        process_s: from the resources to a running process.
        load_s: loading the model.
        call_s: a call's way from the dispatcher to a worker and back.
        open_s: opening a shard; the device may work on others meanwhile.
        publish_s: publishing a shard; the device may work on others meanwhile.
        samples_per_s: of a device.
        lookahead_samples: how many samples are read ahead of the device.
        shards_in_flight: most shards of a worker at a time.
        is_fair: whether the device serves the shards in flight in equal parts, else in the order of arrival.
    """

    process_s: float = 3.0
    load_s: float = 10.0
    call_s: float = 0.002
    open_s: float = 0.5
    publish_s: float = 0.5
    samples_per_s: float = 100.0
    lookahead_samples: int = 200
    shards_in_flight: int = 7
    is_fair: bool = True


class VirtualClock:
    """A time that passes only from one scheduled call to the next."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Schedule a call."""
        heapq.heappush(self._calls, (self.now_s + delay_s, next(self._order), call))

    def step(self, until_s: float) -> bool:
        """Advance to the next call if it is due by then, and run it; return whether there was one."""
        if not self._calls or self._calls[0][0] > until_s:
            return False
        due_s, _, call = heapq.heappop(self._calls)
        self.now_s = max(self.now_s, due_s)
        call()
        return True


def samples_of(shard: ShardSource) -> int:
    """Return the number of samples of a simulated shard."""
    return (shard.size_bytes or 0) // BYTES_PER_SAMPLE


@dataclass(eq=False)
class Attempt:
    """A shard in flight: `device` is the step in which it takes part in the sharing of the device."""

    shard: ShardSource
    samples: int
    done_samples: float = 0.0
    step: Literal["opening", "device", "publishing", "hanging"] = "opening"


class SimulatedWorker:
    """The shards in flight on one worker, and the device that they share.

    Args:
        number: the dispatcher's number of the worker.
        shape: its resources.
        place: where it runs.
        clock: the simulation's clock.
        times: how long its steps take.
        speed: of its device, relative to others.
        on_device_done: called with an attempt whose samples are all done by the device.
        on_room: called when the worker would begin another shard, once for each call of `wait_for_room`.
        failed_share: by shard id, the share of samples that fail.
    """

    def __init__(
        self,
        number: int,
        shape: WorkerShape,
        place: Place,
        clock: VirtualClock,
        times: WorkerTimes,
        speed: float,
        on_device_done: Callable[["SimulatedWorker", Attempt], None],
        on_room: Callable[["SimulatedWorker"], None],
        failed_share: dict[str, float],
    ) -> None:
        self.number, self.shape, self.place = number, shape, place
        self.attempts: dict[str, Attempt] = {}
        self.is_loaded = self.is_gone = self.is_frozen = self.has_broken_context = False
        self._clock, self._times = clock, times
        self._rate = times.samples_per_s * speed
        self._on_device_done, self._on_room = on_device_done, on_room
        self._failed_share = failed_share
        self._wanted_readers = READERS_AT_FIRST
        self._waits_for_room = 0
        self._version = 0
        self._updated_s = clock.now_s
        self._busy_s = 0.0
        self._loaded_s = 0.0

    def loaded(self) -> None:
        """Note that the model is loaded."""
        self.is_loaded, self._loaded_s = True, self._clock.now_s

    def take(self, shard: ShardSource) -> Attempt:
        """Begin a shard."""
        if shard.shard_id in self.attempts:
            raise AssertionError(f"worker {self.number} has {shard.shard_id} in flight already")
        attempt = self.attempts[shard.shard_id] = Attempt(shard, samples_of(shard))
        self._clock.after(self._times.open_s, lambda: self._opened(attempt))
        return attempt

    def end(self, attempt: Attempt) -> None:
        """Remove an attempt that has ended."""
        self._advance()
        self.attempts.pop(attempt.shard.shard_id, None)
        self._plan()

    def hang(self, attempt: Attempt) -> None:
        """Let an attempt make no progress any more."""
        self._advance()
        attempt.step = "hanging"
        self._plan()

    def freeze(self) -> None:
        """Let the worker make no progress and answer nothing any more."""
        self._advance()
        self.is_frozen = True
        self._version += 1

    def has(self, attempt: Attempt) -> bool:
        """Return whether an attempt is in flight on this worker, which still runs."""
        return not self.is_gone and self.attempts.get(attempt.shard.shard_id) is attempt

    def wait_for_room(self) -> None:
        """Answer once there is room."""
        self._waits_for_room += 1
        self._advance()
        self._plan()

    def heartbeat(self) -> Heartbeat:
        """Return the progress of the shards in flight."""
        self._advance()
        progress = {name: self._progress(attempt) for name, attempt in self.attempts.items()}
        ready_s = self._clock.now_s - self._loaded_s
        return Heartbeat(progress, Measures(device_busy_s=self._busy_s, ready_s=ready_s))

    def samples_done(self, attempt: Attempt) -> float:
        """Return how many samples of an attempt the device has done."""
        self._advance()
        return attempt.done_samples

    def counts(self, shard: ShardSource, samples: int) -> ShardCounts:
        """Return the outcomes of so many samples of a shard."""
        failed = round(self._failed_share.get(shard.shard_id, 0.0) * samples)
        return ShardCounts(
            annotated=samples - failed, failed=failed, rows=samples - failed, error_rows=failed
        )

    def _progress(self, attempt: Attempt) -> ShardProgress:
        done = int(attempt.done_samples)
        return ShardProgress(self.counts(attempt.shard, done), done / max(1, attempt.samples))

    def _opened(self, attempt: Attempt) -> None:
        if self.has(attempt) and attempt.step == "opening" and not self.is_frozen:
            self._advance()
            attempt.step = "device"
            self._plan()

    def _on_device(self) -> list[Attempt]:
        attempts = [attempt for attempt in self.attempts.values() if attempt.step == "device"]
        return attempts if self._times.is_fair else attempts[:1]

    def _advance(self) -> None:
        """Let the device work until now."""
        passed_s = self._clock.now_s - self._updated_s
        self._updated_s = self._clock.now_s
        if self.is_frozen or self.is_gone or not passed_s:
            return
        if served := self._on_device():
            self._busy_s += passed_s
            for attempt in served:
                done = attempt.done_samples + passed_s * self._rate / len(served)
                attempt.done_samples = min(done, attempt.samples)

    def _plan(self) -> None:
        """Pass on the attempts that the device has done, and look again when something will change."""
        if self.is_frozen or self.is_gone:
            return
        for attempt in list(self._on_device()):
            if attempt.samples - attempt.done_samples <= ROUNDING_SAMPLES:
                attempt.done_samples = attempt.samples
                attempt.step = "publishing"
                self._on_device_done(self, attempt)
        self._want_more_readers_if_dry()
        while self._waits_for_room and self._has_room():
            self._waits_for_room -= 1
            self._on_room(self)
        self._version += 1
        version = self._version
        if delays_s := self._delays_s():
            self._clock.after(min(delays_s), lambda: self._look_again(version))

    def _look_again(self, version: int) -> None:
        if version == self._version:
            self._advance()
            self._plan()

    def _delays_s(self) -> list[float]:
        served = self._on_device()
        if not served:
            return []
        least = min(attempt.samples - attempt.done_samples for attempt in served)
        delays_s = [max(least, ROUNDING_SAMPLES) * len(served) / self._rate]
        ahead = self._read_ahead() - self._times.lookahead_samples
        if self._waits_for_room and ahead > 0:
            delays_s.append(max(ahead, ROUNDING_SAMPLES) / self._rate)
        return delays_s

    def _read_ahead(self) -> float:
        """Return the samples that the device has still to do of the shards that are open."""
        return sum(a.samples - a.done_samples for a in self.attempts.values() if a.step == "device")

    def _opening(self) -> int:
        return sum(attempt.step in ("opening", "hanging") for attempt in self.attempts.values())

    def _want_more_readers_if_dry(self) -> None:
        # as BatchStream does: more shards are opened at a time once the device has run dry
        is_dry = self._busy_s and not self._on_device()
        if is_dry and self._opening() >= self._wanted_readers:
            self._wanted_readers = min(self._wanted_readers + 1, MOST_READERS)

    def _has_room(self) -> bool:
        return (
            len(self.attempts) < self._times.shards_in_flight
            and self._opening() < self._wanted_readers
            and self._read_ahead() <= self._times.lookahead_samples + ROUNDING_SAMPLES
        )
