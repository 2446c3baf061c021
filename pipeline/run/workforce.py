"""Keep the workers of a run what they should be: start, load and replace them as machines join and leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipeline.config.schema import RunConfig
from pipeline.errors import PipelineError, UserError
from pipeline.output.counts import ShardCounts, total_counts
from pipeline.output.measures import Measures
from pipeline.run.balance import Load
from pipeline.run.hosting import Loaded, Place, Started, WorkerHost
from pipeline.run.places import FORGIVEN_AFTER_SHARDS, LeftAlone, Places
from pipeline.run.plan import (
    MachineResources,
    WorkerPlan,
    WorkerShape,
    asks_wanted,
    no_devices_message,
    plan_workers,
)
from pipeline.run.progress import Progress
from pipeline.run.worker_handle import WorkerHandle

MACHINES_INTERVAL_S = 2.0
NO_WORKER_WARNING_S = 60.0
LOAD_FAILURES_BEFORE_ANY_SUCCESS = 3
MOST_TIMES_FORGIVEN = 2
FIRST_ASK_PAUSE_S, LONGEST_ASK_PAUSE_S = 5.0, 600.0


class WorkersLost(PipelineError):
    """No worker can be kept: they are lost or fail again and again before they have loaded their model."""


class Workforce:
    """The workers of a run and the places where they run.

    Args:
        run: section `run` of the configuration.
        host: runs the workers.
        progress: receives messages.
        shards: number of shards of the run, the largest useful number of workers.
        cpus_only: whether workers compute on CPUs.
        can_grow: whether machines may join.

    Attributes:
        workers: by number.
        places: what happened where.
        lost: workers lost so far.
        released: workers that were stopped because nothing was left for them to do.
        measures_of_former: measures of the workers that have ended.
    """

    def __init__(
        self,
        run: RunConfig,
        host: WorkerHost,
        progress: Progress,
        shards: int,
        *,
        cpus_only: bool,
        can_grow: bool,
    ) -> None:
        self.workers: dict[int, WorkerHandle] = {}
        self.places = Places()
        self.lost = self.released = 0
        self.measures_of_former = Measures()
        self.first_ready_s: float | None = None
        self._run = run
        self._host = host
        self._progress = progress
        self._shards = shards
        self._cpus_only = cpus_only
        self._can_grow = can_grow
        self._numbers = 0
        self._plan = WorkerPlan({}, 0, WorkerShape(1))
        self._notes: set[str] = set()
        self._machines: Sequence[MachineResources] = ()
        self._next_look_s = 0.0
        self._useless_asks = 0
        self._no_further_asks_until_s = 0.0
        self._load_failures = 0
        self._times_forgiven = 0
        self._without_machine_since_s: float | None = None
        self._next_warning_s = host.now_s() + NO_WORKER_WARNING_S

    @property
    def ready(self) -> list[WorkerHandle]:
        """The workers that have loaded their model."""
        return [worker for worker in self.workers.values() if worker.state == "ready"]

    @property
    def usable_places(self) -> frozenset[Place]:
        """Where shards are annotated, or will be once a worker is ready; no device where it is not known."""
        return frozenset(
            worker.place if worker.place.machine_id else Place(worker.shape.node_id)
            for worker in self.workers.values()
            if worker.machine_id
            and not (worker.takes_no_more or worker.is_holder or self.places.is_left_alone(worker.place))
        )

    @property
    def wanted(self) -> int:
        """Workers that the run is after."""
        return self._plan.wanted

    @property
    def measures(self) -> Measures:
        """Of all workers of the run."""
        return sum((worker.measures for worker in self.workers.values()), start=self.measures_of_former)

    @property
    def live_counts(self) -> ShardCounts:
        """Outcomes so far in the shards in flight."""
        return total_counts(
            one.progress.counts for worker in self.workers.values() for one in worker.in_flight.values()
        )

    def loads(self, now_s: float) -> Iterator[Load]:
        """Yield the load of each worker that computes or soon will."""
        for worker in self.workers.values():
            if worker.state in ("ready", "loading") and not worker.takes_no_more:
                yield worker.load(now_s)

    def reconcile(self, shards_unfinished: int) -> list[WorkerHandle]:
        """Look at the machines, and start and stop workers so that they are what they should be.

        Args:
            shards_unfinished: shards that are neither published nor given up; more workers have no use.

        Returns:
            The workers with shards in flight on machines that Ray has begun to drain; the caller moves these.

        Raises:
            UserError: no machine with what a worker needs joined for `run.wait_for_devices_s`.
            WorkersLost: every machine is left alone.
        """
        now_s = self._host.now_s()
        if now_s < self._next_look_s:
            return []
        self._next_look_s = now_s + MACHINES_INTERVAL_S
        machines = self._host.machines()
        if {one.node_id for one in machines} != {one.node_id for one in self._machines}:
            self._useless_asks, self._no_further_asks_until_s = 0, 0.0
        self._machines = machines
        self._plan = plan = self._planned()
        for note in plan.notes:
            if note not in self._notes:
                self._notes.add(note)
                self._progress.say(note)
        drained = self._let_go_of(frozenset(one.node_id for one in self._machines if one.drains))
        self._end_idle()
        self._stop_those_without_machine()
        self._end_those_that_hang(now_s)
        self._release_cores()
        self._start_missing(shards_unfinished, now_s)
        self._request_asks(shards_unfinished)
        self._load_held(now_s)
        self._require_a_machine(now_s)
        self._warn_if_none_is_ready(now_s)
        return drained

    def _planned(self) -> WorkerPlan:
        """Plan workers; where every machine that could hold one is left alone, all are forgiven."""
        usable = [left for one in self._machines if (left := self._without_bad_devices(one)) is not None]
        plan = self._plan_for(usable)
        if self._run.workers:
            # where other machines can hold them all, losses on one may be explained there
            sound = [one for one in usable if not self.places.is_machine_in_doubt(one.node_id)]
            without = self._plan_for(sound)
            plan = without if len(without.shapes) == len(plan.shapes) else plan
        if plan.shapes or self.ready or not self.places.left_alone:
            return plan
        everywhere = self._plan_for(self._machines)
        if everywhere.shapes:
            self._forgive_all()
            return everywhere
        return plan

    def _plan_for(self, machines: Sequence[MachineResources]) -> WorkerPlan:
        return plan_workers(self._run, machines, self._shards, cpus_only=self._cpus_only)

    def _without_bad_devices(self, machine: MachineResources) -> MachineResources | None:
        """Return what workers can use of a machine; a device that is left alone keeps its share of cores."""
        bad = self.places.devices_left_alone(machine.node_id)
        gpus = machine.gpus - bad
        if self.places.is_left_alone(Place(machine.node_id)) or (bad and gpus <= 0):
            return None
        return replace(machine, cpus=machine.cpus * gpus // machine.gpus, gpus=gpus) if bad else machine

    def _forgive_all(self) -> None:
        if self.places.done_since_forgiven >= FORGIVEN_AFTER_SHARDS:
            self._times_forgiven = 0
        if self._times_forgiven >= MOST_TIMES_FORGIVEN:
            reasons = "; ".join(map(str, self.places.left_alone))
            raise WorkersLost(f"every machine of the cluster is left alone: {reasons}")
        self._times_forgiven += 1
        self._progress.say("Every machine of the cluster is left alone; each gets another chance.")
        self.places.forgive_all()

    def _let_go_of(self, draining: frozenset[str]) -> list[WorkerHandle]:
        """Give the workers on machines that are drained no further shard; return those that were working."""
        working = []
        for worker in tuple(self.workers.values()):
            if worker.machine_id not in draining or worker.takes_no_more:
                continue
            worker.takes_no_more = True
            if worker.in_flight:
                working.append(worker)
            host = worker.place.host or worker.machine_id
            names = ", ".join(one.shard.canonical_url for one in worker.in_flight.values()) or "none"
            self._progress.say(f"Machine {host} is being drained; its worker ends. Shards in flight: {names}")
        return working

    def _end_idle(self) -> None:
        for worker in tuple(self.workers.values()):
            if worker.takes_no_more and not worker.in_flight:
                self.end(worker)

    def end(self, worker: WorkerHandle) -> None:
        """Stop a worker, and let its resources go."""
        if self.workers.pop(worker.number, None) is not None:
            self._host.stop(worker.number)
            self.measures_of_former += worker.measures

    def end_as_lost(self, worker: WorkerHandle) -> None:
        """Stop a worker that is of no use any more, and count it as lost."""
        self.end(worker)
        self.lost += 1

    def end_all(self) -> None:
        """Stop every worker."""
        for worker in tuple(self.workers.values()):
            self.end(worker)

    def end_superfluous(self, most_idle: int) -> None:
        """Stop idle workers but for some that may still be needed, so that others can use their devices."""
        idle = [worker for worker in self.ready if not worker.in_flight]
        for worker in idle[max(0, most_idle) :]:
            self.released += 1
            self.end(worker)

    def _stop_those_without_machine(self) -> None:
        """Stop what was requested on machines that are gone, drained or left alone."""
        for worker in tuple(self.workers.values()):
            there = worker.shape.node_id in self._plan.shapes_by_machine
            if worker.state == "requested" and not worker.is_ask and not there:
                self.end(worker)

    def _counted(self) -> Counter[str]:
        """Return the workers on each machine, or meant for it; one that holds a bad device does not count."""
        return Counter(
            worker.machine_id
            for worker in self.workers.values()
            if not (worker.is_ask or worker.takes_no_more or worker.is_holder)
            and not (worker.state == "held" and self.places.is_left_alone(worker.place))
        )

    def _start_missing(self, shards_unfinished: int, now_s: float) -> None:
        counted = self._counted()
        room = min(self._plan.wanted, shards_unfinished) - counted.total()
        # first the bad devices are occupied again
        waits = {
            one.machine_id for one in self.workers.values() if one.is_holder and one.state == "requested"
        }
        for machine_id, shapes in self._plan.shapes_by_machine.items():
            for shape in shapes[counted[machine_id] :]:
                if (
                    room > 0
                    and machine_id not in waits
                    and (shape.gpus or self._may_start_at(Place(machine_id), now_s))
                ):
                    self._start(shape)
                    room -= 1

    def _may_start_at(self, place: Place, now_s: float) -> bool:
        if self.places.rests(place, now_s):
            return False
        return not (self.places.is_in_question(place) and self._others_work(place))

    def _others_work(self, place: Place) -> bool:
        return any(
            worker.place != place and not self.places.is_in_question(worker.place) for worker in self.ready
        )

    def _start(self, shape: WorkerShape, *, is_ask: bool = False) -> None:
        self._numbers += 1
        self.workers[self._numbers] = WorkerHandle(self._numbers, shape, is_ask)
        self._host.start(self._numbers, shape)

    def _request_asks(self, shards_unfinished: int) -> None:
        """Keep as many requests pending as workers are wanted that no machine has room for."""
        asks = [worker for worker in self.workers.values() if worker.is_ask]
        wanted = asks_wanted(self._run, self._plan, shards_unfinished, is_own_ray=not self._can_grow)
        if self._host.now_s() < self._no_further_asks_until_s:
            wanted = min(wanted, len(asks))
        for ask in asks[wanted:]:
            self.end(ask)
        for _ in range(wanted - len(asks)):
            self._start(self._plan.ask, is_ask=True)

    def _load_held(self, now_s: float) -> None:
        for worker in self.workers.values():
            if worker.state == "held" and not worker.is_holder and self._may_load_at(worker.place, now_s):
                self._load(worker)

    def _release_cores(self) -> None:
        """Let what holds a bad device keep no cores that the worker at a good one needs."""
        for worker in tuple(self.workers.values()):
            is_bad = self.places.is_left_alone(worker.place)
            if worker.state != "held":
                continue
            if worker.is_holder and not is_bad:
                self.end(worker)
            # where nothing else runs, cores need not be released
            elif is_bad and worker.shape.cpus > 1 and worker.machine_id in self._plan.shapes_by_machine:
                self.end(worker)
                self._start(replace(worker.shape, cpus=0, node_id=worker.machine_id))

    def _may_load_at(self, place: Place, now_s: float) -> bool:
        return not self.places.is_left_alone(place) and self._may_start_at(place, now_s)

    def _load(self, worker: WorkerHandle) -> None:
        worker.state, worker.asked_s = "loading", self._host.now_s()
        self._host.load(worker.number)

    def _end_those_that_hang(self, now_s: float) -> None:
        """End workers that take too long to load the model, and count each as a failed attempt."""
        timeout_s = self._run.stall_timeout_s
        for worker in tuple(self.workers.values()):
            asked_s = worker.asked_s if worker.state == "loading" else None
            if timeout_s and asked_s is not None and now_s - asked_s > timeout_s:
                self.end_as_lost(worker)
                self.load_failed(
                    worker, f"not loaded after {timeout_s:g} s, the limit of run.stall_timeout_s"
                )

    def _require_a_machine(self, now_s: float) -> None:
        if self._plan.shapes or self.ready:
            self._without_machine_since_s = None
            return
        message = no_devices_message(self._run, self._machines, cpus_only=self._cpus_only)
        if not self._can_grow:
            raise UserError(message)
        if self._without_machine_since_s is None:
            self._without_machine_since_s = now_s
            self._progress.say(
                f"Waiting for machines, at most {self._run.wait_for_devices_s:g} s (run.wait_for_devices_s): "
                f"{message}"
            )
        elif now_s - self._without_machine_since_s >= self._run.wait_for_devices_s:
            waited = f"waited {self._run.wait_for_devices_s:g} s, the limit of run.wait_for_devices_s"
            raise UserError(f"{message}; {waited}")

    def _warn_if_none_is_ready(self, now_s: float) -> None:
        if now_s < self._next_warning_s or self.ready or not self._plan.shapes:
            return
        self._next_warning_s = now_s + NO_WORKER_WARNING_S
        shape = self._plan.shapes[0]
        self._progress.say(
            f"No worker is ready yet; still waiting. A worker needs {shape.cpus} free CPU core(s) and "
            f"{shape.gpus:g} free GPU(s) on one machine, and time to load its model"
        )

    def started(self, event: Started) -> None:
        """Load the model of a worker whose process runs, unless its place is not to be used."""
        worker = self.workers.get(event.worker)
        if worker is None:
            return
        worker.place = event.place
        is_bad = self.places.is_left_alone(worker.place)
        if worker.is_ask and not is_bad and not self._becomes_worker(worker):
            self.end(worker)
            self._ask_was_useless()
            return
        worker.is_ask = False
        if self._may_load_at(worker.place, self._host.now_s()) and not worker.is_holder:
            self._load(worker)
        else:
            # it holds the device, so that what is started next gets another one, perhaps on another machine
            worker.state = "held"

    def _ask_was_useless(self) -> None:
        """Wait before the next request: a machine has room that no worker of this run can use."""
        pause_s = min(LONGEST_ASK_PAUSE_S, FIRST_ASK_PAUSE_S * 2.0 ** min(self._useless_asks, 16))
        self._useless_asks += 1
        self._no_further_asks_until_s = self._host.now_s() + pause_s
        # the machine may have room for a worker with more of its cores
        self._next_look_s = 0.0

    def _becomes_worker(self, ask: WorkerHandle) -> bool:
        machine_id = ask.place.machine_id
        shapes = self._plan.shapes_by_machine.get(machine_id, ())
        missing = len(shapes) - self._counted()[machine_id]
        return missing > 0 and any(shape.cpus == ask.shape.cpus for shape in shapes)

    def loaded(self, event: Loaded) -> None:
        """Make a worker ready, or end it and try again, perhaps elsewhere.

        Raises:
            UserError, WorkersLost: no worker has ever loaded the model, and enough have tried.
        """
        worker = self.workers.get(event.worker)
        if worker is None:
            return
        if event.outcome.message:
            self.end(worker)
            self.load_failed(worker, event.outcome.message, is_user_error=event.outcome.is_user_error)
            return
        now_s = self._host.now_s()
        self.places.loaded(worker.place)
        self._load_failures = 0
        self.first_ready_s = now_s if self.first_ready_s is None else self.first_ready_s
        self._next_warning_s = now_s + NO_WORKER_WARNING_S
        worker.state, worker.ready_s, worker.has_room, worker.asked_s = "ready", now_s, True, None
        # that may have been decided while it loaded
        worker.takes_no_more |= self.places.is_left_alone(worker.place)

    def load_failed(self, worker: WorkerHandle, cause: str, *, is_user_error: bool = False) -> None:
        """Count a worker that was lost or failed before it had loaded its model.

        Raises:
            UserError, WorkersLost: no worker has ever loaded the model, and enough have tried.
        """
        self._load_failures += 1
        place = worker.place if worker.place.machine_id else Place(worker.shape.node_id)
        others_work = any(one.place == place for one in self.ready)
        left_alone = self.places.load_failed(place, cause, self._host.now_s(), others_work=others_work)
        if self.places.has_loaded or not self._all_have_failed():
            where = f" on {place}" if place.machine_id else ""
            self._progress.say(f"A worker{where} did not load the model ({cause}); trying again.")
            if left_alone is not None:
                self.leave_alone(left_alone)
            return
        if is_user_error:
            raise UserError(cause)
        raise WorkersLost(
            f"{self._load_failures} workers in a row did not load the model; the last one: {cause}"
        )

    def _all_have_failed(self) -> bool:
        loading = [worker for worker in self.workers.values() if worker.state == "loading"]
        return self._load_failures >= LOAD_FAILURES_BEFORE_ANY_SUCCESS and not any(
            self.places.load_failures(worker.place) == 0 for worker in loading
        )

    def leave_alone(self, decision: LeftAlone) -> None:
        """Give a place no further shard and no worker in the rest of the run."""
        self._progress.say(f"Left alone for the rest of this run: {decision}")
        for worker in tuple(self.workers.values()):
            if worker.state == "ready" and self.places.is_left_alone(worker.place):
                worker.takes_no_more = True
        self._end_idle()
        self._next_look_s = 0.0

    def remove_lost(self, number: int) -> WorkerHandle | None:
        """Forget a worker that was lost; return it, if it was still known."""
        worker = self.workers.pop(number, None)
        if worker is not None:
            self.lost += 1
            self.measures_of_former += worker.measures
            self._next_look_s = 0.0
        return worker
