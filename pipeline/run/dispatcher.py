"""Run a job on Ray: one actor per device, shards assigned one by one, the outcome of every shard recorded.

Ray's own retries are off because they would hide which shard killed a worker. The dispatcher replaces lost
workers itself and runs the shards that were in flight on them alone, so that a shard that kills its worker
every time is found and given up while all others are annotated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import metrics as ray_metrics

from pipeline import storage
from pipeline.annotate.annotator import ShardProgress
from pipeline.errors import OutputError, PipelineError, UserError
from pipeline.output.counts import total_counts
from pipeline.output.measures import Measures
from pipeline.output.runs import RunState
from pipeline.output.status import reason_to_stop
from pipeline.output.survey import spread_evenly
from pipeline.run import cluster
from pipeline.run import job as jobs
from pipeline.run.cluster import Machine
from pipeline.run.job import Job
from pipeline.run.outcome import JobResult, RunTally, concluded, first_state
from pipeline.run.plan import WorkerPlan, WorkerShape, plan_workers
from pipeline.run.progress import Progress, SharedProgress
from pipeline.run.prometheus import RunMetrics
from pipeline.run.shard_queue import ShardQueue
from pipeline.run.worker import (
    AnnotatorFactory,
    Heartbeat,
    LoadOutcome,
    ShardOutcome,
    Worker,
    build_annotator,
)
from pipeline.storage import ShardSource
from pipeline.text import first_few

MAX_SHARDS_IN_FLIGHT = 12
HEARTBEAT_INTERVAL_S = 2.0
WAIT_S = 0.5
MAX_LOSSES_WHILE_LOADING = 3
MAX_REDOS = 3
NO_WORKER_WARNING_S = 60.0
MACHINE_CHECK_S = 2.0
UNREACHABLE_MACHINE_CHECK_S = 30.0
RETRY_BACKOFF_S = 2.0


class WorkersLost(PipelineError):
    """Workers are lost again and again before they have loaded their model."""


def run_job(
    job: Job,
    progress: Progress,
    factory: AnnotatorFactory = build_annotator,
    *,
    max_shards: int | None = None,
) -> JobResult:
    """Annotate the remaining shards of a job, on this machine or on the cluster that RAY_ADDRESS names.

    Args:
        job: a prepared job.
        progress: receives the state of the run and messages.
        factory: builds the annotator inside each worker.
        max_shards: stop after this many shards, spread evenly over the remaining ones; None: all.

    Returns:
        The counts of the run; shards given up are listed, and recorded in OUT/failed/.

    Raises:
        UserError: workers cannot load with this configuration, or it asks for more than the cluster has.
        OutputError: the output cannot be written.
        WorkersLost: workers are lost again and again while they load their model.
    """
    try:
        result = _run_once(job, progress, factory, max_shards)
        for _ in range(MAX_REDOS):
            if not result.torn:
                break
            # two jobs on one folder may each have written one file of a shard
            progress.say(f"Found files of different attempts; annotating again: {first_few(result.torn)}")
            job = jobs.looked_at_again(job)
            result = _run_once(job, progress, factory, max_shards)
        return result
    finally:
        job.folder.close()


def _run_once(job: Job, progress: Progress, factory: AnnotatorFactory, max_shards: int | None) -> JobResult:
    if not job.todo:
        return concluded(job, JobResult(first_state(job)))
    with cluster.ray_session():
        shards = spread_evenly(job.todo, max_shards)
        plan = plan_workers(job.config.run, cluster.machines_alive(), len(shards))
        check_precision(job, plan)
        progress.say(
            f"Annotating {len(shards):,} shard(s), {first_state(job).shards_skipped:,} done before; starting "
            f"{len(plan.shapes)} worker(s) on {plan.device} with {plan.cpus_text} CPU core(s) each, in "
            f"{job.config.model.precision}"
        )
        for note in plan.notes:
            progress.say(note)
        metrics = RunMetrics(storage.shown_url(job.config.output.dir), ray_metrics.Counter, ray_metrics.Gauge)
        dispatcher = _Dispatcher(job, shards, plan, SharedProgress([progress, metrics]), factory)
        try:
            result = dispatcher.run()
        finally:
            dispatcher.stop_workers()
        return concluded(job, result)


def check_precision(job: Job, plan: WorkerPlan) -> None:
    """Refuse CPUs, on which auto would be fp32, for a job that auto made bf16."""
    precision = job.config.model.precision
    if job.precision_is_auto and plan.device == "cpu" and precision != "fp32":
        raise UserError(
            f"{storage.shown_url(job.config.output.dir)}: the results there are in {precision}, and this run "
            f"has no GPU: resume where there is one; or set model.precision={precision} to continue on CPUs, "
            "slowly; or choose another output.dir"
        )


@dataclass(eq=False)
class _WorkerSlot:
    """A started worker and the shards in flight on it; a worker that replaces it gets a slot of its own.

    Attributes:
        actor: handle of the Ray actor.
        shape: resources of the worker; one that replaces it gets the same.
        ready: whether the model is loaded.
        has_room: whether the worker would begin another shard at once.
        machine: the machine it runs on, once it is ready.
        in_flight: shards assigned and not finished.
        progressed_s: monotonic time at which the counts last changed.
        progress: of the shards in flight, by shard id.
        measures: of the worker since it loaded its model.
    """

    actor: Any
    shape: WorkerShape
    ready: bool = False
    has_room: bool = False
    machine: Machine = field(default_factory=Machine)
    in_flight: list[ShardSource] = field(default_factory=list)
    progressed_s: float = 0.0
    progress: Mapping[str, ShardProgress] = field(default_factory=dict)
    measures: Measures = field(default_factory=Measures)


@dataclass(frozen=True)
class _Loss:
    """A lost worker whose shards are not requeued before it is known whether its machine was lost too."""

    slot: _WorkerSlot
    cause: str
    decide_by_s: float


@dataclass(frozen=True)
class _Call:
    """A remote call that has not returned yet."""

    kind: Literal["load", "annotate", "room", "heartbeat"]
    slot: _WorkerSlot
    shard: ShardSource | None = None


class _RayWorker(Worker):
    """A worker that also reports its machine."""

    def node_id(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


class _Dispatcher:
    """Assign shards to workers, handle what they return and replace lost workers; serves one run."""

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
        self._tally = RunTally(job, progress)
        self._slots: list[_WorkerSlot] = []
        self._calls: dict[Any, _Call] = {}
        self._losses: list[_Loss] = []
        self._losses_while_loading = 0
        self._measures_of_lost_workers = Measures()
        self._next_heartbeat_s = 0.0
        self._started_s = time.monotonic()
        self._first_ready_s: float | None = None
        self._next_warning_s = self._started_s + NO_WORKER_WARNING_S

    def run(self) -> JobResult:
        for shape in self._plan.shapes:
            self._start_worker(shape)
        state, stopped = self._state(), ""
        while not stopped and self._has_work():
            self._assign_shards()
            self._request_heartbeats()
            self._collect()
            self._replace_stalled_workers()
            self._resolve_losses()
            self._warn_if_no_worker_is_ready()
            state = self._state()
            self._progress.update(state)
            stopped = reason_to_stop(self._job.config.run, state)
        return self._tally.result(state, stopped)

    def stop_workers(self) -> None:
        for slot in self._slots:
            ray.kill(slot.actor)

    def _has_work(self) -> bool:
        return bool(len(self._queue) or self._losses or any(slot.in_flight for slot in self._slots))

    def _start_worker(self, shape: WorkerShape) -> None:
        job = self._job
        worker: Any = ray.remote(_RayWorker).options(
            num_cpus=shape.cpus,
            num_gpus=shape.gpus,
            scheduling_strategy=cluster.placed_on(shape.node_id),
            max_restarts=0,
            max_task_retries=0,
            # besides the shards in flight, one thread answers heartbeats and one waits for room
            max_concurrency=MAX_SHARDS_IN_FLIGHT + 2,
        )
        actor = worker.remote(
            job.config, job.metadata, cpus=shape.cpus, device=shape.device, factory=self._factory
        )
        slot = _WorkerSlot(actor, shape)
        self._slots.append(slot)
        self._calls[actor.load.remote()] = _Call("load", slot)

    def _assign_shards(self) -> None:
        # every worker gets its first shard before any gets its second
        free = [slot for slot in self._slots if slot.has_room and len(slot.in_flight) < MAX_SHARDS_IN_FLIGHT]
        for slot in sorted(free, key=lambda slot: len(slot.in_flight)):
            self._assign_next(slot)

    def _assign_next(self, slot: _WorkerSlot) -> None:
        idle_workers = sum(not other.in_flight for other in self._slots)
        if slot.in_flight and len(self._queue) <= idle_workers:
            return
        shard = self._queue.take(slot.in_flight, time.monotonic())
        if shard is not None:
            slot.progressed_s = slot.progressed_s if slot.in_flight else time.monotonic()
            slot.in_flight.append(shard)
            self._calls[slot.actor.annotate.remote(shard)] = _Call("annotate", slot, shard)
            slot.has_room = False
            self._calls[slot.actor.wait_for_room.remote()] = _Call("room", slot)

    def _request_heartbeats(self) -> None:
        if time.monotonic() < self._next_heartbeat_s:
            return
        self._next_heartbeat_s = time.monotonic() + HEARTBEAT_INTERVAL_S
        pending = {id(call.slot) for call in self._calls.values() if call.kind == "heartbeat"}
        for slot in self._slots:
            if slot.in_flight and id(slot) not in pending:
                self._calls[slot.actor.heartbeat.remote()] = _Call("heartbeat", slot)

    def _collect(self) -> None:
        if not self._calls:
            time.sleep(WAIT_S)
            return
        calls = list(self._calls)
        ray.wait(calls, num_returns=1, timeout=WAIT_S)
        # handle all that have returned: the rest of the loop costs the same for one as for many
        returned, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        for reference in returned:
            call = self._calls.pop(reference, None)
            if call is None:
                continue  # its worker was lost a moment ago
            try:
                self._handle(call, ray.get(reference))
            except RayTaskError:
                raise
            except RayError as error:
                # not only RayActorError: Ray's memory monitor kills a worker with an OutOfMemoryError
                self._replace_worker(call.slot, cluster.loss_cause(error))

    def _handle(self, call: _Call, answer: Any) -> None:
        slot = call.slot
        if isinstance(answer, LoadOutcome):
            self._worker_loaded(slot, answer)
        elif isinstance(answer, ShardOutcome) and call.shard is not None:
            slot.measures = answer.measures
            if answer.status == "device":
                self._replace_worker(slot, answer.message)
                return
            slot.in_flight.remove(call.shard)
            slot.progress = {
                shard_id: progress
                for shard_id, progress in slot.progress.items()
                if shard_id != call.shard.shard_id
            }
            slot.progressed_s = time.monotonic()
            self._attempt_ended(call.shard, answer)
        elif call.kind == "room":
            slot.has_room = True
        elif isinstance(answer, Heartbeat):
            if answer.progress != slot.progress:
                slot.progressed_s = time.monotonic()
            in_flight = {shard.shard_id for shard in slot.in_flight}
            slot.progress = {key: answer.progress[key] for key in answer.progress if key in in_flight}
            slot.measures = answer.measures

    def _worker_loaded(self, slot: _WorkerSlot, outcome: LoadOutcome) -> None:
        if outcome.is_user_error:
            raise UserError(outcome.message)
        if outcome.message:
            self._replace_worker(slot, outcome.message)
            return
        self._losses_while_loading = 0
        self._first_ready_s = self._first_ready_s or time.monotonic()
        self._next_warning_s = time.monotonic() + NO_WORKER_WARNING_S
        node_id = ray.get(slot.actor.node_id.remote(), timeout=NO_WORKER_WARNING_S)
        slot.machine = cluster.find_machine(ray.nodes(), node_id)
        slot.ready = slot.has_room = True

    def _attempt_ended(self, shard: ShardSource, outcome: ShardOutcome) -> None:
        if outcome.status == "output":
            raise OutputError(outcome.message)
        if outcome.report is not None:
            self._tally.add_published(shard, outcome.report.counts, outcome.report.damage)
            return
        given_up = self._queue.attempt_failed(shard, outcome.message, time.monotonic())
        if given_up is not None:
            self._tally.add_given_up(given_up)
        else:
            self._progress.say(
                f"{shard.canonical_url}: attempt failed: {outcome.message}; will be tried again"
            )

    def _replace_worker(self, slot: _WorkerSlot, cause: str) -> None:
        if slot not in self._slots:
            return
        ray.kill(slot.actor)
        self._slots.remove(slot)
        self._measures_of_lost_workers += slot.measures
        self._calls = {reference: call for reference, call in self._calls.items() if call.slot is not slot}
        if not slot.ready:
            self._count_loss_while_loading(cause)
        elif slot.in_flight:
            # a machine that goes down takes its worker first
            check_s = UNREACHABLE_MACHINE_CHECK_S if slot.machine.port is None else MACHINE_CHECK_S
            self._losses.append(_Loss(slot, cause, time.monotonic() + check_s))
        else:
            self._progress.say(f"Worker lost ({cause}); restarting. No shards in flight.")
        self._start_worker(slot.shape)

    def _count_loss_while_loading(self, cause: str) -> None:
        self._losses_while_loading += 1
        if self._losses_while_loading >= max(MAX_LOSSES_WHILE_LOADING, 2 * len(self._plan.shapes)):
            raise WorkersLost(
                f"{self._losses_while_loading} workers in a row were lost while loading the model; "
                f"the last one: {cause}"
            )
        self._progress.say(f"Worker lost while loading the model ({cause}); restarting.")

    def _replace_stalled_workers(self) -> None:
        timeout_s = self._job.config.run.stall_timeout_s
        for slot in tuple(self._slots):
            if timeout_s and slot.in_flight and time.monotonic() - slot.progressed_s > timeout_s:
                cause = f"finished no sample for {timeout_s:g} s, the limit of run.stall_timeout_s"
                self._replace_worker(slot, cause)

    def _resolve_losses(self) -> None:
        nodes = ray.nodes() if self._losses else []
        for loss in tuple(self._losses):
            machine_lost = cluster.machine_is_lost(nodes, loss.slot.machine)
            if machine_lost or time.monotonic() >= loss.decide_by_s:
                self._losses.remove(loss)
                self._requeue(loss, machine_lost)

    def _requeue(self, loss: _Loss, machine_lost: bool) -> None:
        shards = [shard for shard in loss.slot.in_flight if not self._tally.add_if_published(shard)]
        names = ", ".join(shard.canonical_url for shard in shards) or "none unpublished"
        if machine_lost:
            machine = loss.slot.machine
            self._progress.say(
                f"Machine {machine.host or machine.node_id} lost; other workers redo its shards. "
                f"Shards in flight: {names}"
            )
            given_up = self._queue.machine_lost(shards, "machine lost again and again")
        else:
            self._progress.say(f"Worker lost ({loss.cause}); restarting. Shards in flight: {names}")
            given_up = self._queue.worker_lost(shards, f"worker lost ({loss.cause})")
        for shard in given_up:
            self._tally.add_given_up(shard)

    def _warn_if_no_worker_is_ready(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_warning_s or any(slot.ready for slot in self._slots):
            return
        self._next_warning_s = now_s + NO_WORKER_WARNING_S
        plan = self._plan
        self._progress.say(
            f"No worker is ready yet; still waiting. Each worker needs {plan.cpus_text} free CPU core(s) and "
            f"{plan.shapes[0].gpus:g} free GPU(s) on one machine, and time to load "
            f"{self._job.config.model.name}"
        )

    def _state(self) -> RunState:
        """Return the shards counted so far, with what the workers last reported."""
        return replace(
            self._tally.state,
            live_counts=total_counts(
                progress.counts for slot in self._slots for progress in slot.progress.values()
            ),
            measures=sum((slot.measures for slot in self._slots), start=self._measures_of_lost_workers),
            workers_ready=sum(slot.ready for slot in self._slots),
            elapsed_s=time.monotonic() - self._started_s,
            loading_s=(self._first_ready_s or time.monotonic()) - self._started_s,
        )
