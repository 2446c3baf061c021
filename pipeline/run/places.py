"""Decide which machines and devices are at fault: those where workers die with shards that others finish.

A lost worker alone does not show whether a shard or a place was at fault. So the shards that were in flight
are tried elsewhere first. A loss counts against its place once each of them was finished at another place; a
shard that is given up explains every loss that it took part in, so that such a shard shuts no place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median_low

from pipeline.run.hosting import Place

STRIKES = 3
STRIKES_OF_A_DEVICE_FAULT = 2
DEVICES_OF_A_BAD_MACHINE = 2
LOAD_FAILURES = 3
# a place that has finished so many shards since its last loss is not the cause of that loss
FORGIVEN_AFTER_SHARDS = 10
# where workers are lost everywhere now and then, a place is at fault only if that happens there more often
MUCH_WORSE = 3
FIRST_REST_S = 2.0
LONGEST_REST_S = 300.0
# a minute in all: a store of shards that is down for a moment must not use up the attempts
RESTS_OF_ALL_PLACES = 5


@dataclass(frozen=True)
class LeftAlone:
    """A place that gets no worker any more in this run.

    Attributes:
        place: the place; without a device: the whole machine.
        reason: why, in a few words.
    """

    place: Place
    reason: str

    def __str__(self) -> str:
        """Return the place and the reason, for display."""
        return f"{self.place}: {self.reason}"


@dataclass(eq=False)
class _Loss:
    """A worker that was lost, or a fault of its machine.

    Attributes:
        shards: that were in flight.
        unfinished: those of them that no other place has finished yet.
        is_device_fault: whether CUDA reported the fault.
    """

    shards: frozenset[str]
    unfinished: set[str]
    is_device_fault: bool


@dataclass
class _Record:
    """What happened at a place.

    Attributes:
        losses: that may still count against the place.
        done: shards finished since the last loss.
        load_failures: in a row.
        attempts_failed: attempts at shards that failed in a row without the loss of a worker.
        loads_after_s: until then no worker loads its model there.
        rests_until_s: until then the place gets neither a worker nor a shard.
    """

    losses: list[_Loss] = field(default_factory=list)
    done: int = 0
    load_failures: int = 0
    attempts_failed: int = 0
    loads_after_s: float = 0.0
    rests_until_s: float = 0.0


class Places:
    """Keep the record of every place at which workers ran."""

    def __init__(self) -> None:
        self._records: defaultdict[Place, _Record] = defaultdict(_Record)
        self._left_alone: dict[Place, LeftAlone] = {}
        self._has_loaded = False
        self._done_since_forgiven = 0

    @property
    def done_since_forgiven(self) -> int:
        """Shards finished since every place got another chance."""
        return self._done_since_forgiven

    @property
    def left_alone(self) -> tuple[LeftAlone, ...]:
        """The places that get no worker any more, in the order in which that was decided."""
        return tuple(self._left_alone.values())

    @property
    def has_loaded(self) -> bool:
        """Whether a worker has loaded its model anywhere."""
        return self._has_loaded

    def is_left_alone(self, place: Place) -> bool:
        """Return whether a device, or its machine, gets no worker any more."""
        return place in self._left_alone or _machine(place) in self._left_alone

    def devices_left_alone(self, machine_id: str) -> int:
        """Return how many devices of a machine get no worker any more."""
        return sum(bool(place.device) and place.machine_id == machine_id for place in self._left_alone)

    def is_on_probation(self, place: Place) -> bool:
        """Return whether losses at a place are not explained yet, or attempts there failed in a row.

        Until then it gets one shard at a time, and none that failed and that a sound place may try.
        """
        record = self._records.get(place)
        return record is not None and (bool(record.losses) or self.fails_in_a_row(place))

    def is_machine_in_doubt(self, machine_id: str) -> bool:
        """Return whether losses on a machine, at any of its devices, are not explained yet."""
        return any(
            place.machine_id == machine_id and bool(record.losses) for place, record in self._records.items()
        )

    def fails_in_a_row(self, place: Place) -> bool:
        """Return whether the last attempts at a place failed without the loss of a worker."""
        record = self._records.get(place)
        return record is not None and record.attempts_failed > 1

    def rests(self, place: Place, now_s: float) -> bool:
        """Return whether a place gets no worker for a moment, after failures in a row."""
        record = self._records.get(place)
        return record is not None and now_s < max(record.rests_until_s, record.loads_after_s)

    def may_try(self, place: Place, now_s: float, *, all_rest: bool = False) -> bool:
        """Return whether a place gets shards now, or rests after attempts that failed in a row.

        Args:
            place: the place.
            now_s: the time.
            all_rest: whether every place rests. If that lasts, the shards are at fault.
        """
        record = self._records.get(place)
        is_awake = record is None or now_s >= record.rests_until_s
        return is_awake or (all_rest and record is not None and record.attempts_failed > RESTS_OF_ALL_PLACES)

    def is_in_question(self, place: Place) -> bool:
        """Return whether so much was lost at a place that others should first try those shards."""
        record = self._records.get(place)
        return record is not None and len(record.losses) >= STRIKES

    def loaded(self, place: Place) -> None:
        """Record that a worker has loaded its model."""
        self._has_loaded = True
        self._records[place].load_failures = 0

    def load_failed(
        self, place: Place, cause: str, now_s: float, *, others_work: bool = False
    ) -> LeftAlone | None:
        """Record that a worker was lost or failed while it loaded its model.

        Args:
            place: where.
            cause: why, in one line.
            now_s: the time.
            others_work: whether workers of this run are ready there: the place may have no room for another.

        Returns:
            The place, if it is left alone from now on: where others have loaded the model.
        """
        record = self._records[place]
        record.load_failures += 1
        record.loads_after_s = now_s + _rest_s(record.load_failures)
        if record.load_failures < LOAD_FAILURES or others_work or not self._has_loaded:
            return None
        return self._leave_alone(place, f"the model could not be loaded {LOAD_FAILURES} times: {cause}")

    def load_failures(self, place: Place) -> int:
        """Return how many workers in a row could not load their model at a place."""
        return self._records[place].load_failures

    def worker_lost(self, place: Place, shards: Iterable[str], *, is_device_fault: bool = False) -> None:
        """Record a lost worker with the shards in flight on it, or a shard that its machine failed at."""
        record = self._records[place]
        names = frozenset(shards)
        record.done = 0
        # the loss of a worker with the same shards again says nothing more about the place
        if names and not any(names <= loss.shards for loss in record.losses):
            record.losses.append(_Loss(names, set(names), is_device_fault))

    def attempt_failed(self, place: Place, now_s: float) -> None:
        """Record a shard that could not be read or annotated; a place where many in a row fail rests."""
        record = self._records[place]
        if now_s < record.rests_until_s:
            return  # begun before the rest
        record.attempts_failed += 1
        if record.attempts_failed > 1:
            record.rests_until_s = now_s + _rest_s(record.attempts_failed - 1)

    def shard_done(self, place: Place, shard_id: str) -> list[LeftAlone]:
        """Record a finished shard.

        Returns:
            The places that are left alone from now on, because others have finished what they failed at.
        """
        here = self._records[place]
        self._done_since_forgiven += 1
        here.done += 1
        here.attempts_failed = 0
        if here.done >= FORGIVEN_AFTER_SHARDS:
            here.losses.clear()
        return list(self._decided(place, shard_id))

    def _decided(self, finished_at: Place, shard_id: str) -> Iterator[LeftAlone]:
        for place, record in tuple(self._records.items()):
            concerned = [loss for loss in record.losses if shard_id in loss.shards]
            for loss in concerned:
                if place == finished_at:
                    # the place can do what it seemed to fail at
                    record.losses.remove(loss)
                    continue
                loss.unfinished.discard(shard_id)
            if concerned:
                yield from self._judged(place)

    def _judged(self, place: Place) -> Iterator[LeftAlone]:
        if self.is_left_alone(place):
            return
        strikes = [loss for loss in self._records[place].losses if not loss.unfinished]
        faults = sum(loss.is_device_fault for loss in strikes)
        is_worse = len(strikes) >= MUCH_WORSE * self._usual_losses(place)
        if is_worse and (len(strikes) >= STRIKES or faults >= STRIKES_OF_A_DEVICE_FAULT):
            what = "CUDA failed" if faults == len(strikes) else "worker lost"
            yield self._leave_alone(place, f"{what} {len(strikes)} times with shards that others finished")
            machine = _machine(place)
            bad = [other for other in self._left_alone if _machine(other) == machine != other]
            if len(bad) >= DEVICES_OF_A_BAD_MACHINE:
                yield self._leave_alone(machine, f"{len(bad)} of its devices are left alone")

    def _usual_losses(self, place: Place) -> int:
        """Return the median number of losses that the other places are not forgiven; bad ones may be many."""
        others = [
            len(record.losses)
            for other, record in self._records.items()
            if other != place and not self.is_left_alone(other)
        ]
        return median_low(others) if others else 0

    def shard_given_up(self, shard_id: str) -> None:
        """Take a shard that is given up for the cause of every loss that it took part in."""
        for record in self._records.values():
            record.losses = [loss for loss in record.losses if shard_id not in loss.shards]

    def forgive_all(self) -> None:
        """Give every place another chance, because no other place is there any more."""
        self._left_alone.clear()
        self._records.clear()
        self._done_since_forgiven = 0

    def _leave_alone(self, place: Place, reason: str) -> LeftAlone:
        decision = LeftAlone(place, reason)
        self._left_alone[place] = decision
        return decision


def _machine(place: Place) -> Place:
    return Place(place.machine_id, place.host)


def _rest_s(times: int) -> float:
    return min(LONGEST_REST_S, FIRST_REST_S * 2.0 ** min(times - 1, 16))
