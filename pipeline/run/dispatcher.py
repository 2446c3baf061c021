"""The job on Ray: one actor per device, shards handed out one by one, every shard's fate known.

Ray's own retries are off: they would hide which shard killed a worker. The driver replaces workers itself,
suspects the shards that a dead worker had in hand, and runs suspects alone, so that a shard which kills its
worker every time is found and given up while all others go on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import metrics as ray_metrics

from pipeline import storage
from pipeline.errors import DamagedFileError, OutputError, PipelineError, UserError
from pipeline.output.budget import reason_to_stop
from pipeline.output.counts import ShardCounts, total_counts
from pipeline.output.footers import checked_footer
from pipeline.output.measures import Measures
from pipeline.output.reading import damage_of
from pipeline.output.survey import spread_evenly
from pipeline.process import exit_on_sigterm
from pipeline.run import job as jobs
from pipeline.run.cluster import (
    Machine,
    cause_of_death,
    check_address,
    find_machine,
    machine_is_lost,
    settle_token,
)
from pipeline.run.job import Job
from pipeline.run.outcome import JobResult, concluded, first_state
from pipeline.run.plan import WorkerPlan, plan_workers
from pipeline.run.progress import Progress, SharedProgress
from pipeline.run.prometheus import RunMetrics
from pipeline.run.shard_queue import GivenUp, ShardQueue
from pipeline.run.worker import AnnotatorFactory, LoadOutcome, Pulse, ShardOutcome, Worker, build_annotator
from pipeline.storage import ShardSource

MAX_SHARDS_IN_HAND = 12
PULSE_INTERVAL_S = 2.0
WAIT_S = 0.5
MAX_LOAD_DEATHS = 3
MAX_REDOS = 3
PATIENCE_S = 60.0
DOUBT_S = 2.0
UNREACHABLE_DOUBT_S = 30.0
RETRY_BACKOFF_S = 2.0
LOCAL_OBJECT_STORE_BYTES = 128 << 20


class WorkersDied(PipelineError):
    """Workers die before they have loaded their model."""


def run_job(
    job: Job,
    progress: Progress,
    factory: AnnotatorFactory = build_annotator,
    *,
    max_shards: int | None = None,
) -> JobResult:
    """Annotate what is left of a job, locally or on the cluster that RAY_ADDRESS names.

    Args:
        job: a prepared job.
        progress: is told where the run stands.
        factory: builds the annotator inside each worker.
        max_shards: stop after as many, spread evenly over what is left; None: all.

    Returns:
        The counts; shards given up are named, in OUT/failed/ too.

    Raises:
        UserError: the configuration keeps workers from loading, or asks for what the cluster lacks.
        OutputError: the output cannot be written.
        WorkersDied: workers die again and again while they load.
    """
    try:
        result = _run_once(job, progress, factory, max_shards)
        for _ in range(MAX_REDOS):
            if not result.torn:
                break
            # two jobs on one folder may each have written one file of a shard
            progress.say(f"files that do not belong together; done again: {', '.join(result.torn)}")
            job = jobs.looked_at_again(job)
            result = _run_once(job, progress, factory, max_shards)
        return result
    finally:
        job.folder.close()


def _run_once(job: Job, progress: Progress, factory: AnnotatorFactory, max_shards: int | None) -> JobResult:
    if not job.todo:
        return concluded(job, JobResult(first_state(job)))
    with _ray():
        shards = spread_evenly(job.todo, max_shards)
        plan = plan_workers(job.config.run, _machines(), len(shards))
        progress.say(
            f"{len(shards)} shard(s) to do, {first_state(job).shards_skipped} done before; "
            f"{plan.workers} worker(s) on {plan.device} with {plan.cpus} CPU core(s) each"
        )
        metrics = RunMetrics(storage.shown_url(job.config.output.dir), ray_metrics.Counter, ray_metrics.Gauge)
        dispatcher = _Dispatcher(job, shards, plan, SharedProgress([progress, metrics]), factory)
        try:
            result = dispatcher.run()
        finally:
            dispatcher.stop_workers()
        return concluded(job, result)


def _machines() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _start_own_ray() -> None:
    """Start Ray on loopback, for those alone who know the token: whoever reaches it may run code."""
    settle_token(os.environ)
    constants = ray._private.ray_constants
    networked = constants.ENABLE_RAY_CLUSTER
    # as on macOS and Windows; an address of 127.0.0.1 that it is given Ray replaces by that of the network
    constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
        )
    finally:
        constants.ENABLE_RAY_CLUSTER = networked


@contextmanager
def _ray() -> Iterator[None]:
    address = os.environ.get("RAY_ADDRESS") or "local"
    check_address(address)
    # ray then leaves CUDA_VISIBLE_DEVICES of CPU workers alone, its coming default
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if address == "local":
            _start_own_ray()
        else:
            ray.init(address=address, logging_level=logging.ERROR)
    except (ConnectionError, RayError) as error:
        raise UserError(f"RAY_ADDRESS {address}: no ray cluster answers: {error}") from error
    try:
        # only now: a handler that is there before ray.init() is never called
        with exit_on_sigterm():
            yield
    finally:
        ray.shutdown()


@dataclass(eq=False)
class _Seat:
    """A place for a worker: its actor, and what it has in hand."""

    actor: Any
    ready: bool = False
    has_room: bool = False
    machine: Machine = field(default_factory=Machine)
    in_hand: list[ShardSource] = field(default_factory=list)
    moved_s: float = 0.0
    live_counts: ShardCounts = field(default_factory=ShardCounts)
    measures: Measures = field(default_factory=Measures)


@dataclass(frozen=True)
class _Loss:
    """A worker that is gone; its shards wait until it is clear whether its machine went too."""

    seat: _Seat
    what: str
    until_s: float


@dataclass(frozen=True)
class _Call:
    kind: Literal["load", "annotate", "room", "pulse"]
    seat: _Seat
    shard: ShardSource | None = None


class _RayWorker(Worker):
    """A worker that also knows its machine."""

    def node_id(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


class _Dispatcher:
    """Hands shards to workers and settles what comes back. Used for one run, then thrown away."""

    def __init__(
        self,
        job: Job,
        shards: Sequence[ShardSource],
        plan: WorkerPlan,
        progress: Progress,
        factory: AnnotatorFactory,
    ) -> None:
        run = job.config.run
        self._job = job
        self._plan = plan
        self._progress = progress
        self._factory = factory
        self._queue = ShardQueue(shards, max_attempts=run.max_attempts, backoff_s=RETRY_BACKOFF_S)
        self._failed: list[tuple[str, str]] = []
        self._damaged: list[tuple[str, str]] = []
        self._listed = job.listed
        self._seats: list[_Seat] = []
        self._calls: dict[Any, _Call] = {}
        self._losses: list[_Loss] = []
        self._load_deaths = 0
        self._measures_of_the_dead = Measures()
        self._next_pulse_s = 0.0
        self._state = first_state(job)
        self._started_s = time.monotonic()
        self._first_ready_s: float | None = None
        self._next_complaint_s = self._started_s + PATIENCE_S

    def run(self) -> JobResult:
        for _ in range(self._plan.workers):
            self._hire()
        stopped = ""
        while not stopped and (len(self._queue) or self._losses or any(seat.in_hand for seat in self._seats)):
            self._hand_out()
            self._ask_for_pulse()
            self._collect()
            self._dismiss_who_stalls()
            self._judge_losses()
            self._complain_if_no_worker_comes()
            self._show()
            stopped = reason_to_stop(self._job.config.run, self._state)
        return JobResult(self._state, tuple(self._failed), tuple(self._damaged), stopped=stopped)

    def stop_workers(self) -> None:
        for seat in self._seats:
            ray.kill(seat.actor)

    def _hire(self) -> None:
        options = {
            "num_cpus": self._plan.cpus,
            "num_gpus": self._plan.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            # one thread more than shards in hand answers the pulse, one waits for room
            "max_concurrency": MAX_SHARDS_IN_HAND + 2,
        }
        actor: Any = (
            ray.remote(_RayWorker)
            .options(**options)
            .remote(
                self._job.config,
                self._job.metadata,
                cpus=self._plan.cpus,
                device=self._plan.device,
                factory=self._factory,
            )
        )
        seat = _Seat(actor)
        self._seats.append(seat)
        self._calls[actor.load.remote()] = _Call("load", seat)

    def _hand_out(self) -> None:
        # everybody's first shard before anybody's second
        free = [seat for seat in self._seats if seat.has_room and len(seat.in_hand) < MAX_SHARDS_IN_HAND]
        for seat in sorted(free, key=lambda seat: len(seat.in_hand)):
            self._give_next(seat)

    def _give_next(self, seat: _Seat) -> None:
        waiting_for_a_first = sum(not other.in_hand for other in self._seats)
        if seat.in_hand and len(self._queue) <= waiting_for_a_first:
            return
        shard = self._queue.take(seat.in_hand, time.monotonic())
        if shard is not None:
            seat.moved_s = seat.moved_s if seat.in_hand else time.monotonic()
            seat.in_hand.append(shard)
            self._calls[seat.actor.annotate.remote(shard)] = _Call("annotate", seat, shard)
            seat.has_room = False
            self._calls[seat.actor.wait_for_room.remote()] = _Call("room", seat)

    def _ask_for_pulse(self) -> None:
        if time.monotonic() < self._next_pulse_s:
            return
        self._next_pulse_s = time.monotonic() + PULSE_INTERVAL_S
        asked = {id(call.seat) for call in self._calls.values() if call.kind == "pulse"}
        for seat in self._seats:
            if seat.in_hand and id(seat) not in asked:
                self._calls[seat.actor.pulse.remote()] = _Call("pulse", seat)

    def _collect(self) -> None:
        if not self._calls:
            time.sleep(WAIT_S)
            return
        calls = list(self._calls)
        ray.wait(calls, num_returns=1, timeout=WAIT_S)
        # all that have ended by now: what the loop does besides costs as much for one as for many
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        for reference in ready:
            call = self._calls.pop(reference, None)
            if call is None:
                continue  # of a worker that was lost a moment ago
            try:
                self._settle(call, ray.get(reference))
            except RayTaskError:
                raise
            except RayError as error:
                # also what is no RayActorError: ray's memory monitor kills a worker with an OutOfMemoryError
                self._worker_lost(call.seat, f"died: {cause_of_death(error)}")

    def _settle(self, call: _Call, answer: Any) -> None:
        if isinstance(answer, LoadOutcome):
            self._loaded(call.seat, answer)
        elif isinstance(answer, ShardOutcome) and call.shard is not None:
            call.seat.in_hand.remove(call.shard)
            call.seat.live_counts = answer.live_counts
            call.seat.measures, call.seat.moved_s = answer.measures, time.monotonic()
            self._attempted(call.shard, answer)
        elif call.kind == "room":
            call.seat.has_room = True
        elif isinstance(answer, Pulse):
            if answer.counts != call.seat.live_counts:
                call.seat.moved_s = time.monotonic()
            call.seat.live_counts, call.seat.measures = answer.counts, answer.measures

    def _loaded(self, seat: _Seat, outcome: LoadOutcome) -> None:
        if outcome.message:
            raise UserError(outcome.message)
        self._load_deaths = 0
        self._first_ready_s = self._first_ready_s or time.monotonic()
        self._next_complaint_s = time.monotonic() + PATIENCE_S
        node_id = ray.get(seat.actor.node_id.remote(), timeout=PATIENCE_S)
        seat.machine = find_machine(ray.nodes(), node_id)
        seat.ready = seat.has_room = True

    def _attempted(self, shard: ShardSource, outcome: ShardOutcome) -> None:
        if outcome.status == "fatal":
            raise OutputError(outcome.message)
        if outcome.report is not None:
            self._published(shard, outcome.report.counts, outcome.report.damage)
            return
        self._progress.say(f"{shard.canonical_url}: attempt failed: {outcome.message}")
        given_up = self._queue.attempt_failed(shard, outcome.message, time.monotonic())
        if given_up is not None:
            self._give_up(given_up)

    def _published(self, shard: ShardSource, counts: ShardCounts, damage: str) -> None:
        if shard.shard_id in self._job.failed:
            jobs.forget_failure(self._job.folder, shard.shard_id)
        state = replace(self._state, counts=self._state.counts + counts)
        if damage:
            self._damaged.append((shard.canonical_url, damage))
            self._progress.say(f"{shard.canonical_url}: damaged: {damage}; its intact samples are annotated")
            self._state = replace(state, shards_damaged=state.shards_damaged + 1)
        else:
            self._state = replace(state, shards_done=state.shards_done + 1)

    def _give_up(self, given_up: GivenUp) -> None:
        shard = given_up.shard
        jobs.record_failure(self._job.folder, shard, given_up.attempts, given_up.message)
        self._failed.append((shard.canonical_url, given_up.message))
        self._state = replace(self._state, shards_failed=self._state.shards_failed + 1)
        self._progress.say(f"{shard.canonical_url}: given up after {given_up.attempts} attempt(s)")

    def _worker_lost(self, seat: _Seat, what: str) -> None:
        if seat not in self._seats:
            return
        ray.kill(seat.actor)
        self._seats.remove(seat)
        self._measures_of_the_dead += seat.measures
        self._calls = {reference: call for reference, call in self._calls.items() if call.seat is not seat}
        if not seat.ready:
            self._load_deaths += 1
            if self._load_deaths >= max(MAX_LOAD_DEATHS, 2 * self._plan.workers):
                raise WorkersDied(f"{self._load_deaths} workers in a row died while they loaded; one {what}")
        if seat.in_hand:
            # a machine that goes down takes its worker first
            doubt_s = UNREACHABLE_DOUBT_S if seat.machine.port is None else DOUBT_S
            self._losses.append(_Loss(seat, what, time.monotonic() + doubt_s))
        self._hire()

    def _dismiss_who_stalls(self) -> None:
        timeout_s = self._job.config.run.stall_timeout_s
        for seat in tuple(self._seats):
            if timeout_s and seat.in_hand and time.monotonic() - seat.moved_s > timeout_s:
                self._worker_lost(seat, f"finished no sample for {timeout_s:g} s (run.stall_timeout_s)")

    def _judge_losses(self) -> None:
        nodes = ray.nodes() if self._losses else []
        for loss in tuple(self._losses):
            machine_lost = machine_is_lost(nodes, loss.seat.machine)
            if machine_lost or time.monotonic() >= loss.until_s:
                self._losses.remove(loss)
                self._take_back(loss, machine_lost)

    def _take_back(self, loss: _Loss, machine_lost: bool) -> None:
        unpublished = [shard for shard in loss.seat.in_hand if not self._found_published(shard)]
        names = ", ".join(shard.canonical_url for shard in unpublished) or "nothing unpublished"
        if machine_lost:
            self._progress.say(f"a machine was lost; its shards go to other workers: {names}")
            given_up = self._queue.node_lost(unpublished, "its machine was lost, time and again")
        else:
            self._progress.say(f"a worker {loss.what}; it is replaced; it had in hand: {names}")
            given_up = self._queue.worker_died(unpublished, f"the worker {loss.what}")
        for gone in given_up:
            self._give_up(gone)

    def _found_published(self, shard: ShardSource) -> bool:
        """Whether a lost worker had published a shard: both files of one attempt, of the input as listed."""
        out, shard_id = self._job.folder.url, shard.shard_id
        try:
            footer = checked_footer(out, shard_id, self._listed[shard_id], self._job.stamp.config_hash)
        except DamagedFileError:
            return False
        damage = damage_of(out, shard_id) if footer.state == "damaged" else ""
        self._published(shard, footer.counts(), damage)
        return True

    def _complain_if_no_worker_comes(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_complaint_s or any(seat.ready for seat in self._seats):
            return
        self._next_complaint_s = now_s + PATIENCE_S
        plan = self._plan
        self._progress.say(
            f"still no worker is ready: each needs {plan.cpus} CPU core(s) and {plan.gpus:g} GPU(s) free "
            f"on one machine, and time to load {self._job.config.model.name}"
        )

    def _show(self) -> None:
        live = total_counts(seat.live_counts for seat in self._seats if seat.in_hand)
        self._state = replace(
            self._state,
            live_counts=live,
            measures=sum((seat.measures for seat in self._seats), start=self._measures_of_the_dead),
            workers_ready=sum(seat.ready for seat in self._seats),
            elapsed_s=time.monotonic() - self._started_s,
            loading_s=(self._first_ready_s or time.monotonic()) - self._started_s,
        )
        self._progress.update(self._state)
