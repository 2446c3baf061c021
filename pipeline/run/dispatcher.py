"""Assign shards to workers, one by one, and see to it that every shard is published or given up.

Nothing here knows Ray or a clock: a `WorkerHost` runs the workers, and says what happened and when. Ray's own
retries are off because they would hide which shard killed a worker, and at which place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pipeline.annotate.annotator import ShardReport
from pipeline.config.schema import RunConfig
from pipeline.errors import OutputError, ScratchError
from pipeline.output.counts import ShardCounts
from pipeline.output.runs import RunState
from pipeline.output.status import reason_to_stop
from pipeline.run.assignment import Assignments
from pipeline.run.balance import Balance
from pipeline.run.failures import FailuresInARow
from pipeline.run.hosting import (
    Abandoned,
    Ended,
    Event,
    HasRoom,
    Heard,
    Loaded,
    Lost,
    Place,
    Started,
    WorkerHost,
)
from pipeline.run.progress import Progress
from pipeline.run.shard_queue import GivenUp, ShardQueue
from pipeline.run.worker_handle import ShardInFlight, WorkerHandle
from pipeline.run.workforce import Workforce
from pipeline.storage import ShardSource

WAIT_S = 0.5
HEARTBEAT_INTERVAL_S = 2.0
# heartbeats of very many workers must not take all of the driver's time
MOST_HEARTBEATS_PER_S = 100
# a round of assignments looks at all workers; many workers wait a moment for the next one
MOST_ASSIGNMENTS_BY_WORKERS_PER_S = 10_000
CHECK_INTERVAL_S = 1.0
ABANDON_ANSWER_S = 10.0
RETRY_BACKOFF_S = 2.0
MOST_REFUSALS_OF_A_SHARD = 10
# a shard is taken from a slow worker only if an idle one would save much time with it
MUCH_SLOWER, SAVED_BY_A_MOVE_S = 2.0, 30.0


class Tally(Protocol):
    """Counts the shards of a run by outcome; `RunTally` also records failures in the output folder."""

    state: RunState

    def add_published(self, shard: ShardSource, counts: ShardCounts, damage: str) -> None:
        """Count a published shard."""

    def add_if_published(self, shard: ShardSource) -> bool:
        """Count a shard if a worker that is lost had published it; return whether it had."""

    def add_given_up(self, given_up: GivenUp) -> None:
        """Count a shard that is given up."""


@dataclass(frozen=True)
class RunEnd:
    """How a dispatcher ended.

    Attributes:
        state: at the end.
        stopped: why it stopped early; empty if it did not.
        terminated: whether it stopped because it was asked to.
    """

    state: RunState
    stopped: str = ""
    terminated: bool = False


@dataclass(frozen=True)
class _Drain:
    """Nothing new is begun, and what is nearly done is finished until a time."""

    reason: str
    until_s: float
    terminated: bool


class Dispatcher:
    """Serves one run.

    Args:
        run: section `run` of the configuration.
        shards: the shards to annotate.
        host: runs the workers.
        tally: counts the outcomes of shards.
        progress: receives the state of the run and messages.
        cpus_only: whether workers compute on CPUs.
        can_grow: whether machines may join the cluster.
        is_terminated: returns whether the run was asked to end.
        drain_s_after_sigterm: how long it may then take; None: `run.drain_s`.
    """

    def __init__(
        self,
        run: RunConfig,
        shards: Sequence[ShardSource],
        host: WorkerHost,
        tally: Tally,
        progress: Progress,
        *,
        cpus_only: bool = False,
        can_grow: bool = True,
        is_terminated: Callable[[], bool] = lambda: False,
        drain_s_after_sigterm: float | None = None,
    ) -> None:
        self._run = run
        self._host = host
        self._tally = tally
        self._progress = progress
        self._is_terminated = is_terminated
        self._drain_s_after_sigterm = run.drain_s if drain_s_after_sigterm is None else drain_s_after_sigterm
        self._queue = ShardQueue(shards, max_attempts=run.max_attempts, backoff_s=RETRY_BACKOFF_S)
        self._workforce = Workforce(run, host, progress, len(shards), cpus_only=cpus_only, can_grow=can_grow)
        self._in_flight = 0
        self._failures = FailuresInARow()
        self._refusals: Counter[str] = Counter()
        self._drain: _Drain | None = None
        self._started_s = host.now_s()
        self._next_assignment_s = 0.0
        self._next_heartbeat_s = 0.0
        self._next_check_s = 0.0
        self._next_state_s = 0.0

    def run(self) -> RunEnd:
        """Annotate the shards; the workers are stopped at the end, whatever it is.

        Raises:
            UserError: workers cannot load with this configuration, or the machines for them do not join.
            OutputError: the output cannot be written, several times in a row.
            ScratchError: several times in a row, machines could not hold what a shard needs.
            WorkersLost: no worker can be kept.
        """
        try:
            while len(self._queue) or self._in_flight:
                self._move(self._workforce.reconcile(len(self._queue) + self._in_flight))
                self._begin_drain_if_needed()
                if self._drain is None:
                    self._assign()
                elif self._is_drained():
                    break
                self._request_heartbeats()
                for event in self._host.events(WAIT_S):
                    self._handle(event)
                self._check()
                self._show_state()
            # of the workers that the run had: those that it let go of at its end count too
            state = self._state()
            state = replace(state, workers_ready=state.workers_ready + self._workforce.released)
        finally:
            self._workforce.end_all()
        self._progress.update(state)
        drain = self._drain
        stopped = drain.reason if drain else reason_to_stop(self._run, state)
        return RunEnd(state, stopped, terminated=drain is not None and drain.terminated)

    def _show_state(self) -> None:
        now_s = self._host.now_s()
        if now_s >= self._next_state_s:
            self._next_state_s = now_s + max(WAIT_S, len(self._workforce.workers) / MOST_HEARTBEATS_PER_S)
            self._progress.update(self._state())

    def _state(self) -> RunState:
        workforce, now_s = self._workforce, self._host.now_s()
        first_ready_s = now_s if workforce.first_ready_s is None else workforce.first_ready_s
        return replace(
            self._tally.state,
            live_counts=workforce.live_counts,
            measures=workforce.measures,
            workers_ready=len(workforce.ready),
            workers_wanted=workforce.wanted,
            workers_lost=workforce.lost,
            left_alone=tuple(map(str, workforce.places.left_alone)),
            elapsed_s=now_s - self._started_s,
            loading_s=first_ready_s - self._started_s,
        )

    def _assign(self) -> None:
        now_s, workforce = self._host.now_s(), self._workforce
        if not len(self._queue) or now_s < max(self._next_assignment_s, self._failures.paused_until_s):
            return
        self._next_assignment_s = now_s + len(workforce.workers) / MOST_ASSIGNMENTS_BY_WORKERS_PER_S
        most = self._run.shards_in_flight
        workers = [worker for worker in workforce.ready if not worker.takes_no_more]
        if not any(worker.has_room and len(worker.in_flight) < most for worker in workers):
            return
        balance = Balance(workforce.loads(now_s), self._queue.bytes_left)
        for worker, shard in Assignments(self._queue, workers, balance, workforce.places, most, now_s):
            size_bytes = self._queue.size_of(shard)
            worker.in_flight[shard.shard_id] = ShardInFlight(shard, size_bytes, now_s, now_s)
            self._in_flight += 1
            self._host.annotate(worker.number, shard)
            worker.has_room = False
            self._host.wait_for_room(worker.number)

    # what happens

    def _handle(self, event: Event) -> None:
        match event:
            case Started():
                self._workforce.started(event)
            case Loaded():
                self._workforce.loaded(event)
            case HasRoom():
                if worker := self._workforce.workers.get(event.worker):
                    worker.has_room = True
            case Heard():
                self._heard(event)
            case Ended():
                self._attempt_ended(event)
            case Abandoned():
                self._abandoned(event)
            case Lost():
                self._lost(event)

    def _heard(self, event: Heard) -> None:
        worker = self._workforce.workers.get(event.worker)
        if worker is None:
            return
        worker.asked_s, worker.measures = None, event.heartbeat.measures
        now_s = self._host.now_s()
        for shard_id, progress in event.heartbeat.progress.items():
            in_flight = worker.in_flight.get(shard_id)
            if in_flight and in_flight.reported(progress, now_s):
                worker.progressed(in_flight, now_s)

    def _attempt_ended(self, event: Ended) -> None:
        worker, shard, outcome = self._workforce.workers.get(event.worker), event.shard, event.outcome
        if worker is None:
            return
        worker.measures = outcome.measures
        if outcome.status == "device":
            self._workforce.end_as_lost(worker)
            self._take_back(worker, outcome.message, is_device_fault=True)
            return
        in_flight = self._no_longer_in_flight(worker, shard)
        if in_flight is None:
            return
        match outcome.status:
            case "done":
                self._done(worker, in_flight, outcome.report)
            case "retry":
                self._workforce.places.attempt_failed(worker.place, self._host.now_s())
                self._failed_attempt(worker, shard, outcome.message)
            case "machine":
                error = ScratchError(f"{worker.place}: {outcome.message}")
                self._failures.machine_failed(
                    worker.place, self._machines_at_work(), error, len(self._workforce.ready)
                )
                self._workforce.places.worker_lost(worker.place, [shard.shard_id])
                self._failed_attempt(worker, shard, f"{outcome.message} (on {worker.place})")
            case "output":
                self._not_written(worker, in_flight, outcome.message)
            case "abandoned":
                # this may arrive before the worker's answer to the request
                self._gave_way(worker, in_flight)

    def _not_written(self, worker: WorkerHandle, in_flight: ShardInFlight, message: str) -> None:
        """Try a shard elsewhere that could not be published; give it up if no other shard has the trouble."""
        shard, now_s = in_flight.shard, self._host.now_s()
        self._refusals[shard.shard_id] += 1
        if self._refusals[shard.shard_id] >= MOST_REFUSALS_OF_A_SHARD:
            self._give_up(GivenUp(shard, self._refusals[shard.shard_id], message))
        else:
            self._progress.say(f"{shard.canonical_url}: {message}; will be tried again")
            self._queue.put_back(shard, now_s, avoided=worker.place)
        if self._failures.output_refused(
            worker.place, self._machines_at_work(), in_flight.started_s, OutputError(message), now_s
        ):
            self._workforce.places.attempt_failed(worker.place, now_s)

    def _machines_at_work(self) -> set[str]:
        return {
            worker.machine_id
            for worker in self._workforce.workers.values()
            if worker.in_flight or worker.state == "loading"
        }

    def _no_longer_in_flight(self, worker: WorkerHandle, shard: ShardSource) -> ShardInFlight | None:
        in_flight = worker.in_flight.pop(shard.shard_id, None)
        if in_flight is not None:
            self._in_flight -= 1
        return in_flight

    def _done(self, worker: WorkerHandle, in_flight: ShardInFlight, report: ShardReport | None) -> None:
        if report is None:
            raise TypeError("a shard that is done comes with a report")
        self._failures.shard_done(worker.place, self._host.now_s())
        worker.progressed(in_flight, self._host.now_s())
        worker.shards_done += 1
        worker.bytes_done += in_flight.size_bytes
        self._tally.add_published(in_flight.shard, report.counts, report.damage)
        self._was_published_at(worker.place, in_flight.shard)

    def _was_published_at(self, place: Place, shard: ShardSource) -> None:
        for decision in self._workforce.places.shard_done(place, shard.shard_id):
            self._queue.forget_attempts_at(decision.place)
            self._workforce.leave_alone(decision)

    def _failed_attempt(self, worker: WorkerHandle, shard: ShardSource, message: str) -> None:
        given_up = self._queue.attempt_failed(
            worker.place, shard, message, self._host.now_s(), self._others(worker)
        )
        if given_up is None:
            self._progress.say(f"{shard.canonical_url}: attempt failed: {message}; will be tried again")
        else:
            self._give_up(given_up)

    def _give_up(self, given_up: GivenUp) -> None:
        self._workforce.places.shard_given_up(given_up.shard.shard_id)
        self._tally.add_given_up(given_up)

    def _others(self, worker: WorkerHandle) -> frozenset[Place]:
        """Return the other places at which a shard can be tried, now or once a worker there is ready."""
        return self._workforce.usable_places - {worker.place}

    def _lost(self, event: Lost) -> None:
        worker = self._workforce.remove_lost(event.worker)
        if worker is None:
            return
        if worker.state == "ready":
            self._take_back(worker, event.cause, machine_lost=event.machine_lost)
        elif not event.machine_lost:
            self._workforce.load_failed(worker, f"worker lost: {event.cause}")

    def _take_back(
        self, worker: WorkerHandle, cause: str, *, machine_lost: bool = False, is_device_fault: bool = False
    ) -> None:
        """Requeue the shards of a worker that is no longer there, but for those that it had published."""
        in_flight = [one.shard for one in worker.in_flight.values()]
        self._in_flight -= len(in_flight)
        worker.in_flight.clear()
        shards = []
        for shard in in_flight:
            if self._tally.add_if_published(shard):
                self._was_published_at(worker.place, shard)
            else:
                shards.append(shard)
        names = ", ".join(shard.canonical_url for shard in shards) or "none"
        if machine_lost:
            self._progress.say(
                f"Machine {worker.place.host or worker.machine_id} lost; other workers redo its shards. "
                f"Shards in flight: {names}"
            )
            given_up = self._queue.machine_lost(
                worker.place, shards, "machine lost again and again", self._others(worker)
            )
        else:
            self._progress.say(f"Worker on {worker.place} lost ({cause}). Shards in flight: {names}")
            ids = [shard.shard_id for shard in shards]
            self._workforce.places.worker_lost(worker.place, ids, is_device_fault=is_device_fault)
            given_up = self._queue.worker_lost(
                worker.place, shards, f"worker lost ({cause})", self._others(worker)
            )
        for one in given_up:
            self._give_up(one)

    # shards that do not progress, and machines that are drained

    def _request_heartbeats(self) -> None:
        now_s = self._host.now_s()
        if now_s < self._next_heartbeat_s:
            return
        busy = [worker for worker in self._workforce.ready if worker.in_flight]
        self._next_heartbeat_s = now_s + max(HEARTBEAT_INTERVAL_S, len(busy) / MOST_HEARTBEATS_PER_S)
        for worker in busy:
            if worker.asked_s is None:
                worker.asked_s = now_s
                self._host.heartbeat(worker.number)

    def _check(self) -> None:
        now_s = self._host.now_s()
        if now_s < self._next_check_s:
            return
        self._next_check_s = now_s + CHECK_INTERVAL_S
        timeout_s = self._run.stall_timeout_s
        for worker in self._workforce.ready:
            for one in tuple(worker.in_flight.values()):
                if one.abandoned_s is not None:
                    if now_s - one.abandoned_s > ABANDON_ANSWER_S:
                        self._replace_silent(worker, one)
                        break
                elif timeout_s and now_s - one.progressed_s > timeout_s:
                    self._abandon(worker, one)
        if not len(self._queue):
            self._move_from_slow_devices(now_s)
            self._workforce.end_superfluous(self._in_flight)

    def _abandon(self, worker: WorkerHandle, in_flight: ShardInFlight) -> None:
        in_flight.abandoned_s = self._host.now_s()
        self._host.abandon(worker.number, in_flight.shard)

    def _replace_silent(self, worker: WorkerHandle, in_flight: ShardInFlight) -> None:
        self._workforce.end_as_lost(worker)
        cause = "does not answer" if in_flight.is_moved else self._stall_text()
        self._take_back(worker, cause)

    def _stall_text(self) -> str:
        return f"finished no sample for {self._run.stall_timeout_s:g} s, the limit of run.stall_timeout_s"

    def _abandoned(self, event: Abandoned) -> None:
        worker = self._workforce.workers.get(event.worker)
        in_flight = worker.in_flight.get(event.shard.shard_id) if worker else None
        if worker is None or in_flight is None:
            return
        if event.will_not_publish:
            self._no_longer_in_flight(worker, event.shard)
            self._gave_way(worker, in_flight)
        elif in_flight.was_publishing:
            # for all of run.stall_timeout_s
            self._replace_silent(worker, in_flight)
        else:
            in_flight.was_publishing, in_flight.abandoned_s = True, None
            in_flight.progressed_s = self._host.now_s()

    def _gave_way(self, worker: WorkerHandle, in_flight: ShardInFlight) -> None:
        """Let another worker redo a shard that a worker will not publish."""
        if in_flight.is_moved or in_flight.abandoned_s is None:
            self._queue.put_back(in_flight.shard, self._host.now_s(), avoided=worker.place)
            return
        # a thread of the worker may hang for ever
        worker.takes_no_more = True
        self._workforce.places.attempt_failed(worker.place, self._host.now_s())
        self._failed_attempt(worker, in_flight.shard, self._stall_text())

    def _move_from_slow_devices(self, now_s: float) -> None:
        """Let idle workers redo the last shards where that ends much sooner: a device may be far too slow."""
        idle = [
            speed
            for worker in self._workforce.ready
            if not (worker.in_flight or worker.takes_no_more) and (speed := worker.bytes_per_s(now_s))
        ]
        for worker in self._workforce.ready if idle and self._drain is None else ():
            for one in worker.in_flight.values():
                expected_s = worker.expected_s(one, now_s) or 0.0
                redone_s = one.size_bytes / max(idle)
                is_too_slow = expected_s > MUCH_SLOWER * redone_s + SAVED_BY_A_MOVE_S
                # once only: what failed elsewhere would come back
                if is_too_slow and one.abandoned_s is None and self._queue.may_run_anywhere(one.shard):
                    one.is_moved = True
                    self._abandon(worker, one)

    def _move(self, workers: Iterable[WorkerHandle]) -> None:
        """Let other workers redo the shards that are not nearly done on machines that are drained."""
        now_s = self._host.now_s()
        for worker in workers:
            for one in worker.in_flight.values():
                expected_s = worker.expected_s(one, now_s)
                if expected_s is not None and expected_s > self._run.drain_s and one.abandoned_s is None:
                    one.is_moved = True
                    self._abandon(worker, one)

    # the end

    def _begin_drain_if_needed(self) -> None:
        terminated = self._is_terminated()
        if self._drain and (self._drain.terminated or not terminated):
            return
        reason = "terminated" if terminated else reason_to_stop(self._run, self._tally.state)
        if not reason:
            return
        drain_s = self._drain_s_after_sigterm if terminated else self._run.drain_s
        until_s = self._host.now_s() + drain_s
        self._drain = _Drain(
            reason, min(until_s, self._drain.until_s) if self._drain else until_s, terminated
        )
        self._next_heartbeat_s = 0.0
        self._progress.say(
            f"Ending ({reason}): no shard is begun any more; shards that are nearly done are finished "
            f"within {drain_s:g} s (run.drain_s)"
        )

    def _is_drained(self) -> bool:
        """Return whether nothing in flight is expected to be finished in the time that is left."""
        now_s = self._host.now_s()
        left_s = self._drain.until_s - now_s if self._drain else 0.0
        if left_s <= 0:
            return True
        for worker in self._workforce.ready:
            for one in worker.in_flight.values():
                expected_s = worker.expected_s(one, now_s)
                if expected_s is None or expected_s <= left_s:
                    return False
        return True
