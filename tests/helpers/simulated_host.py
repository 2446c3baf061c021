"""A cluster with a virtual clock: machines that join, drain and leave, workers on them, and their faults.

It leaves out Ray (what a call costs, how it schedules many workers) and all files. The same requests in the
same order have the same results: time passes only in `events`, and nothing is drawn at random.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeline.annotate.annotator import ShardReport
from pipeline.run.hosting import Abandoned, Ended, Event, HasRoom, Heard, Loaded, Lost, Place, Started
from pipeline.run.plan import MachineResources, WorkerShape
from pipeline.run.worker import LoadOutcome, ShardOutcome
from pipeline.storage import ShardSource
from tests.helpers.simulated_faults import Dies, Effect, Fails, Fault, Hangs
from tests.helpers.simulated_machines import Reservations, SimulatedMachine
from tests.helpers.simulated_records import Death, Put, Records
from tests.helpers.simulated_worker import Attempt, SimulatedWorker, VirtualClock, WorkerTimes

MOST_CALLS_AT_ONE_TIME = 10_000


@dataclass(frozen=True)
class RayTimes:
    """How long the cluster takes to notice what happened.

    Attributes:
        worker_lost_s: until a worker's end is reported, as that of a worker alone.
        machine_lost_s: until a machine that is gone is known to be, and the end of its workers reported.
        machine_added_s: until a machine joins that was asked for.
    """

    worker_lost_s: float = 2.0
    machine_lost_s: float = 5.0
    machine_added_s: float = 60.0


class TimeIsUp(AssertionError):
    """The run did not end within the time that the simulation allows."""


class SimulatedHost:
    """A WorkerHost with a virtual clock.

    Args:
        machines: of the cluster, each with the times at which it joins and leaves.
        faults: asked in their order; the first one that strikes counts.
        times: how long the steps of a worker take.
        ray: how long the cluster takes to notice what happened.
        reserve: machines that join, one after the other, while a worker has no machine with room for it, as
            an autoscaler adds them.
        failed_share: by shard id, the share of samples that fail, such as images that cannot be decoded.
        time_limit_s: when a run that has not ended is a failure.
    """

    def __init__(
        self,
        machines: Sequence[SimulatedMachine],
        faults: Sequence[Fault] = (),
        *,
        times: WorkerTimes | None = None,
        ray: RayTimes | None = None,
        reserve: Sequence[SimulatedMachine] = (),
        failed_share: dict[str, float] | None = None,
        time_limit_s: float = 1e6,
    ) -> None:
        self.records = Records()
        self._faults = faults
        self._times, self._ray = times or WorkerTimes(), ray or RayTimes()
        self._reserve = list(reserve)
        self._failed_share = failed_share or {}
        self._time_limit_s = time_limit_s
        self._clock = VirtualClock()
        self._known: dict[str, Reservations] = {}
        self._draining: set[str] = set()
        self._gone: set[str] = set()
        self._pending: dict[int, WorkerShape] = {}
        self._placed: dict[int, tuple[WorkerShape, Place]] = {}
        self._workers: dict[int, SimulatedWorker] = {}
        self._silent: set[int] = set()
        self._answers: list[Event] = []
        self._calls_at_this_time = 0
        self._asked_for = False
        for machine in machines:
            self._expect(machine)

    # --- WorkerHost

    def now_s(self) -> float:
        return self._clock.now_s

    def machines(self) -> Sequence[MachineResources]:
        return [
            MachineResources(known.machine.cpus, known.machine.gpus, name, drains=name in self._draining)
            for name, known in self._known.items()
        ]

    def start(self, worker: int, shape: WorkerShape) -> None:
        if worker in self._pending or worker in self._placed:
            raise AssertionError(f"worker {worker} was started before")
        self._pending[worker] = shape
        self._clock.after(self._times.call_s, self._place_pending)

    def load(self, worker: int) -> None:
        self._clock.after(self._times.call_s, lambda: self._load(worker))

    def annotate(self, worker: int, shard: ShardSource) -> None:
        self._clock.after(self._times.call_s, lambda: self._annotate(worker, shard))

    def wait_for_room(self, worker: int) -> None:
        self._clock.after(self._times.call_s, lambda: self._with(worker, SimulatedWorker.wait_for_room))

    def heartbeat(self, worker: int) -> None:
        self._clock.after(
            self._times.call_s,
            lambda: self._with(worker, lambda found: self._answer(Heard(worker, found.heartbeat()))),
        )

    def abandon(self, worker: int, shard: ShardSource) -> None:
        self._clock.after(
            self._times.call_s, lambda: self._with(worker, lambda found: self._abandon(found, shard))
        )

    def stop(self, worker: int) -> None:
        self._silent.add(worker)
        self._pending.pop(worker, None)
        if found := self._workers.get(worker):
            self._lose_work(found, "repeated")
        self._end(worker)

    def events(self, timeout_s: float) -> Sequence[Event]:
        started_s = self._clock.now_s
        until_s = started_s + max(0.0, timeout_s)
        while not self._answers and self._clock.step(until_s):
            pass
        # what happens at the same moment is reported together
        while self._answers and self._clock.step(self._clock.now_s):
            pass
        if not self._answers:
            self._clock.now_s = until_s
        self._check_that_time_passes(started_s)
        answers, self._answers = self._answers, []
        return [event for event in answers if event.worker not in self._silent]

    # --- beyond the protocol

    def pass_time(self, duration_s: float) -> None:
        """Let time pass in which the dispatcher computes."""
        until_s = self._clock.now_s + duration_s
        while self._clock.step(until_s):
            pass
        self._clock.now_s = until_s

    @property
    def pending(self) -> Sequence[WorkerShape]:
        """Shapes of the workers that have no machine: the demand that an autoscaler sees."""
        return tuple(self._pending.values())

    def workers_at(self, place: Place) -> int:
        """Return the number of workers that run at a place now."""
        return sum(found == place for _, found in self._placed.values())

    # --- machines

    def _expect(self, machine: SimulatedMachine) -> None:
        now_s = self._clock.now_s
        if machine.joins_s <= now_s:
            self._join(machine)
        else:
            self._clock.after(machine.joins_s - now_s, lambda: self._join(machine))
        if machine.drains_s is not None:
            self._clock.after(machine.drains_s - now_s, lambda: self._draining.add(machine.node_id))
        if machine.leaves_s is not None:
            self._clock.after(machine.leaves_s - now_s, lambda: self._leave(machine.node_id))

    def _join(self, machine: SimulatedMachine) -> None:
        self._known[machine.node_id] = Reservations(machine)
        self.records.joined.append(machine)
        self._place_pending()

    def _leave(self, node_id: str) -> None:
        self._gone.add(node_id)
        for number, (_, place) in list(self._placed.items()):
            if place.machine_id == node_id:
                self._die(number, "its machine was lost", with_machine=True)
        self._clock.after(self._ray.machine_lost_s, lambda: self._forget(node_id))

    def _forget(self, node_id: str) -> None:
        self._known.pop(node_id, None)
        self._draining.discard(node_id)
        self._place_pending()

    # --- places

    def _place_pending(self) -> None:
        for number, shape in list(self._pending.items()):
            if shape.node_id and shape.node_id not in self._known:
                del self._pending[number]
                self._answer(Lost(number, "the machine that it was meant for is gone", machine_lost=True))
            elif place := self._reserved(shape):
                del self._pending[number]
                self._placed[number] = (shape, place)
                self._clock.after(self._times.process_s, lambda number=number: self._run(number))
        if self._reserve and not self._asked_for and any(not s.node_id for s in self._pending.values()):
            self._asked_for = True
            self._clock.after(self._ray.machine_added_s, self._add_from_reserve)

    def _reserved(self, shape: WorkerShape) -> Place | None:
        names = [shape.node_id] if shape.node_id else list(self._known)
        for name in names:
            if name not in self._draining and name not in self._gone:
                place = self._known[name].reserve(shape)
                if place is not None:
                    return place
        return None

    def _add_from_reserve(self) -> None:
        self._asked_for = False
        self._join(replace(self._reserve.pop(0), joins_s=self._clock.now_s))

    def _run(self, number: int) -> None:
        if number not in self._placed:
            return
        shape, place = self._placed[number]
        self._workers[number] = SimulatedWorker(
            number,
            shape,
            place,
            self._clock,
            self._times,
            self._known[place.machine_id].machine.speed,
            self._device_done,
            lambda found: self._answer(HasRoom(found.number)),
            self._failed_share,
        )
        self.records.started[place] += 1
        self._answer(Started(number, place))

    # --- workers

    def _load(self, number: int) -> None:
        worker = self._workers.get(number)
        if worker is None:
            return
        self.records.loads[worker.place] += 1
        faults = (fault.on_loading(worker.place) for fault in self._faults)
        effect = next((effect for effect in faults if effect is not None), LoadOutcome())
        if isinstance(effect, Dies):
            self._clock.after(effect.after_s, lambda: self._die(number, effect.cause))
        elif isinstance(effect, LoadOutcome):
            self._clock.after(self._times.load_s, lambda: self._loaded(worker, effect))

    def _loaded(self, worker: SimulatedWorker, outcome: LoadOutcome) -> None:
        if not worker.is_gone:
            if not outcome.message:
                worker.loaded()
            self._answer(Loaded(worker.number, outcome))

    def _annotate(self, number: int, shard: ShardSource) -> None:
        worker = self._workers.get(number)
        if worker is None or worker.is_frozen:
            return
        if not worker.is_loaded:
            raise AssertionError(f"worker {number} has not loaded its model")
        self.records.takes[shard.shard_id].append(worker.place)
        attempt = worker.take(shard)
        if worker.has_broken_context:
            self._strike(worker, attempt, Fails(0.0, "device", "CUDA error: context is destroyed"))
        now_s = self._clock.now_s
        faults = (fault.on_taking(worker.place, shard, now_s) for fault in self._faults)
        effect = next((effect for effect in faults if effect is not None), None)
        if effect is not None:
            self._clock.after(effect.after_s, lambda: self._strike(worker, attempt, effect))

    def _strike(self, worker: SimulatedWorker, attempt: Attempt, effect: Effect) -> None:
        if not worker.has(attempt) or worker.is_frozen:
            return
        match effect:
            case Dies(cause=cause):
                self._die(worker.number, cause)
            case Hangs(freezes_worker=True):
                worker.freeze()
            case Hangs():
                worker.hang(attempt)
            case Fails(status=status, message=message):
                worker.has_broken_context |= status == "device"
                self.records.work.repeated += worker.samples_done(attempt)
                self._end_attempt(worker, attempt, ShardOutcome(status, message=message))

    def _device_done(self, worker: SimulatedWorker, attempt: Attempt) -> None:
        self._clock.after(self._times.publish_s, lambda: self._publish(worker, attempt))

    def _publish(self, worker: SimulatedWorker, attempt: Attempt) -> None:
        if not worker.has(attempt) or worker.is_frozen or attempt.step != "publishing":
            return
        shard, work, now_s = attempt.shard, self.records.work, self._clock.now_s
        faults = (fault.on_publishing(worker.place, shard, now_s) for fault in self._faults)
        refused = next((refused for refused in faults if refused is not None), None)
        if isinstance(refused, Hangs):
            return
        if refused is not None:
            work.repeated += attempt.samples
            self._end_attempt(worker, attempt, ShardOutcome(refused.status, message=refused.message))
            return
        if self.records.puts[shard.shard_id]:
            work.repeated += attempt.samples
        else:
            work.published += attempt.samples
        self.records.puts[shard.shard_id].append(Put(worker.number, worker.place, now_s))
        report = ShardReport(worker.counts(shard, attempt.samples), 0.0)
        self._end_attempt(worker, attempt, ShardOutcome("done", report))

    def _abandon(self, worker: SimulatedWorker, shard: ShardSource) -> None:
        attempt = worker.attempts.get(shard.shard_id)
        if attempt is None or attempt.step == "publishing":
            self._answer(Abandoned(worker.number, shard, will_not_publish=False))
            return
        self._answer(Abandoned(worker.number, shard, will_not_publish=True))
        if attempt.step != "hanging":
            # what hangs is never published, but never ends either
            self.records.work.repeated += worker.samples_done(attempt)
            self._end_attempt(worker, attempt, ShardOutcome("abandoned"))

    def _end_attempt(self, worker: SimulatedWorker, attempt: Attempt, outcome: ShardOutcome) -> None:
        self._answer(Ended(worker.number, attempt.shard, outcome))
        worker.end(attempt)

    def _die(self, number: int, cause: str, *, with_machine: bool = False) -> None:
        """End a worker's process, which is reported once it is known whether its machine was lost too."""
        if number not in self._placed:
            return
        _, place = self._placed[number]
        shards: tuple[str, ...] = ()
        if worker := self._workers.get(number):
            shards = tuple(worker.attempts)
            self._lose_work(worker, "lost_with_machines" if with_machine else "lost_by_deaths")
        self.records.deaths.append(Death(number, place, self._clock.now_s, cause, shards))
        self._end(number)
        delay_s = self._ray.machine_lost_s if with_machine else self._ray.worker_lost_s
        self._clock.after(delay_s, lambda: self._answer(Lost(number, cause, with_machine)))

    def _lose_work(self, worker: SimulatedWorker, what: str) -> None:
        done = sum(worker.samples_done(attempt) for attempt in worker.attempts.values())
        setattr(self.records.work, what, getattr(self.records.work, what) + done)

    def _end(self, number: int) -> None:
        if worker := self._workers.pop(number, None):
            worker.is_gone = True
        if placed := self._placed.pop(number, None):
            shape, place = placed
            if place.machine_id in self._known:
                self._known[place.machine_id].release(shape, place)
            self._clock.after(self._times.call_s, self._place_pending)

    def _with(self, number: int, call: Callable[[SimulatedWorker], None]) -> None:
        """Pass a request on to a worker that runs and answers."""
        worker = self._workers.get(number)
        if worker is not None and not worker.is_frozen:
            call(worker)

    def _answer(self, event: Event) -> None:
        self._answers.append(event)

    def _check_that_time_passes(self, started_s: float) -> None:
        self._calls_at_this_time = 0 if self._clock.now_s > started_s else self._calls_at_this_time + 1
        if self._calls_at_this_time > MOST_CALLS_AT_ONE_TIME:
            raise TimeIsUp(f"{MOST_CALLS_AT_ONE_TIME} calls of events() at {self._clock.now_s:g} s")
        if self._clock.now_s > self._time_limit_s:
            raise TimeIsUp(f"the run had not ended after {self._time_limit_s:g} s")
