"""The job on Ray: one actor per device, shards handed out one by one, every shard's fate known.

Ray's own retries are off: they would hide which shard killed a worker. The driver replaces workers itself,
suspects the shards that a dead worker had in hand, and runs suspects alone, so that a shard which kills its
worker every time is found and given up while all others go on.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Literal, NoReturn

import ray
from ray.exceptions import RayActorError, RayError

from pipeline import job as jobs
from pipeline import storage
from pipeline.config import RunConfig
from pipeline.errors import OutputError, PipelineError, UserError
from pipeline.job import Job
from pipeline.progress import Progress, RunState
from pipeline.records import ShardCounts, total_counts
from pipeline.shard_queue import GivenUp, ShardQueue
from pipeline.storage import ShardSource
from pipeline.worker import AnnotatorFactory, LoadOutcome, ShardOutcome, Worker, build_annotator
from pipeline.writer import published_counts

logger = logging.getLogger(__name__)

SHARDS_IN_HAND = 2
PULSE_INTERVAL_S = 2.0
WAIT_S = 0.5
MAX_LOAD_DEATHS = 3
RETRY_BACKOFF_S = 2.0
BUDGET_SAMPLES = 1000
LOCAL_OBJECT_STORE_BYTES = 128 << 20


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers, and what each one holds.

    Attributes:
        workers: number of actors.
        cpus: CPU cores of each.
        gpus: GPUs of each; 0 for CPU workers.
    """

    workers: int
    cpus: int
    gpus: float

    @property
    def device(self) -> str:
        """The torch device of each worker; ray shows a GPU worker its own device alone."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True)
class JobResult:
    """How a run ended.

    Attributes:
        state: shard and sample counts of this run.
        failed: canonical URL and last error of every shard given up.
        stopped: why the run stopped early; empty where it did not.
    """

    state: RunState
    failed: tuple[tuple[str, str], ...] = ()
    stopped: str = ""

    @property
    def complete(self) -> bool:
        """Whether every shard of the job is done."""
        return not self.state.shards_failed and not self.state.shards_left


class WorkersDied(PipelineError):
    """Workers die before they have loaded their model."""


def run_job(job: Job, progress: Progress, factory: AnnotatorFactory = build_annotator) -> JobResult:
    """Annotate what is left of a job, locally or on the cluster that RAY_ADDRESS names.

    Args:
        job: a prepared job.
        progress: is told where the run stands.
        factory: builds the annotator inside each worker.

    Returns:
        The counts; shards given up are named, in OUT/failed/ too.

    Raises:
        UserError: the configuration keeps workers from loading, or asks for what the cluster lacks.
        OutputError: the output cannot be written.
        WorkersDied: workers die again and again while they load.
    """
    if not job.todo:
        return _concluded(job, JobResult(_first_state(job)))
    with _ray():
        plan = plan_workers(job.config.run, ray.cluster_resources(), len(job.todo))
        progress.say(
            f"{len(job.todo)} shard(s) to do, {len(job.shards) - len(job.todo)} done before; "
            f"{plan.workers} worker(s) on {plan.device} with {plan.cpus} CPU core(s) each"
        )
        dispatcher = _Dispatcher(job, plan, progress, factory)
        try:
            return _concluded(job, dispatcher.run())
        finally:
            dispatcher.stop_workers()


def plan_workers(run: RunConfig, cluster: dict[str, float], shards: int) -> WorkerPlan:
    """Share the cluster's devices out: GPU workers where it has GPUs, else CPU workers.

    Args:
        run: the configuration's run section.
        cluster: ray's cluster resources.
        shards: no more workers than shards are planned.

    Raises:
        UserError: the cluster cannot hold a single worker as configured.
    """
    cluster_cpus, cluster_gpus = int(cluster.get("CPU", 0)), cluster.get("GPU", 0.0)
    gpus = run.gpus_per_worker if cluster_gpus else 0.0
    if gpus > cluster_gpus:
        raise UserError(f"run.gpus_per_worker: {gpus:g} asked for, the cluster has {cluster_gpus:g}")
    by_gpu = int(cluster_gpus // gpus) if gpus else None
    wanted = min(run.workers or by_gpu or max(1, cluster_cpus // 8), shards)
    cpus = run.cpus_per_worker or max(1, min(8, cluster_cpus // wanted))
    if cpus > cluster_cpus:
        raise UserError(f"run.cpus_per_worker: {cpus} asked for, the cluster has {cluster_cpus}")
    workers = min(wanted, cluster_cpus // cpus, by_gpu if by_gpu is not None else wanted)
    return WorkerPlan(workers, cpus, gpus)


@contextmanager
def _ray() -> Iterator[None]:
    address = os.environ.get("RAY_ADDRESS", "local")
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    # ray then leaves CUDA_VISIBLE_DEVICES of CPU workers alone, its coming default
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address=address, logging_level=logging.ERROR, **(local if address == "local" else {}))
    except (ConnectionError, RayError) as error:
        raise UserError(f"RAY_ADDRESS {address}: no ray cluster answers: {error}") from error
    # only now: a handler that is there before ray.init() is never called
    earlier_handler = signal.signal(signal.SIGTERM, _end_on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier_handler)
        ray.shutdown()


def _end_on_sigterm(_signal_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def _first_state(job: Job) -> RunState:
    given_up = sum(shard.shard_id in job.given_up for shard in job.shards)
    return RunState(shards_total=len(job.shards), shards_skipped=len(job.shards) - len(job.todo) - given_up)


def _concluded(job: Job, result: JobResult) -> JobResult:
    left_alone = [
        (shard.canonical_url, "given up in an earlier run")
        for shard in job.shards
        if shard.shard_id in job.given_up
    ]
    result = replace(
        result,
        state=replace(result.state, shards_failed=result.state.shards_failed + len(left_alone)),
        failed=(*result.failed, *left_alone),
    )
    out = job.config.output.dir
    if result.complete and not storage.exists(out, jobs.SUCCESS_FILE):
        counts = total_counts(published_counts(out, shard.shard_id) for shard in job.shards)
        jobs.record_success(out, len(job.shards), counts)
    return result


@dataclass(eq=False)
class _Seat:
    """A place for a worker: its actor, and what it has in hand."""

    actor: Any
    ready: bool = False
    node_id: str = ""
    in_hand: list[ShardSource] = field(default_factory=list)
    live_counts: ShardCounts = field(default_factory=ShardCounts)


@dataclass(frozen=True)
class _Call:
    kind: Literal["load", "annotate", "pulse"]
    seat: _Seat
    shard: ShardSource | None = None


class _RayWorker(Worker):
    """A worker that also knows its machine."""

    def node_id(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


class _Dispatcher:
    """Hands shards to workers and settles what comes back. Used for one run, then thrown away."""

    def __init__(self, job: Job, plan: WorkerPlan, progress: Progress, factory: AnnotatorFactory) -> None:
        run = job.config.run
        self._job = job
        self._plan = plan
        self._progress = progress
        self._factory = factory
        self._queue = ShardQueue(job.todo, max_attempts=run.max_attempts, backoff_s=RETRY_BACKOFF_S)
        self._failed: list[tuple[str, str]] = []
        self._seats: list[_Seat] = []
        self._calls: dict[Any, _Call] = {}
        self._load_deaths = 0
        self._next_pulse_s = 0.0
        self._state = _first_state(job)
        self._started_s = time.monotonic()

    def run(self) -> JobResult:
        for _ in range(self._plan.workers):
            self._hire()
        stopped = ""
        while not stopped and (len(self._queue) or any(seat.in_hand for seat in self._seats)):
            self._hand_out()
            self._ask_for_pulse()
            self._collect()
            self._show()
            stopped = self._reason_to_stop()
        return JobResult(self._state, tuple(self._failed), stopped)

    def stop_workers(self) -> None:
        for seat in self._seats:
            ray.kill(seat.actor)

    def _hire(self) -> None:
        options = {
            "num_cpus": self._plan.cpus,
            "num_gpus": self._plan.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            # one thread more than shards in hand answers the pulse
            "max_concurrency": SHARDS_IN_HAND + 1,
        }
        actor: Any = (
            ray.remote(_RayWorker)
            .options(**options)
            .remote(
                self._job.config,
                self._job.stamp.as_metadata(),
                cpus=self._plan.cpus,
                device=self._plan.device,
                factory=self._factory,
            )
        )
        seat = _Seat(actor)
        self._seats.append(seat)
        self._calls[actor.load.remote()] = _Call("load", seat)

    def _hand_out(self) -> None:
        for seat in self._seats:
            while seat.ready and len(seat.in_hand) < SHARDS_IN_HAND:
                shard = self._queue.take(seat.in_hand, time.monotonic())
                if shard is None:
                    break
                seat.in_hand.append(shard)
                self._calls[seat.actor.annotate.remote(shard)] = _Call("annotate", seat, shard)

    def _ask_for_pulse(self) -> None:
        if time.monotonic() < self._next_pulse_s:
            return
        self._next_pulse_s = time.monotonic() + PULSE_INTERVAL_S
        asked = {id(call.seat) for call in self._calls.values() if call.kind == "pulse"}
        for seat in self._seats:
            if seat.in_hand and id(seat) not in asked:
                self._calls[seat.actor.live_counts.remote()] = _Call("pulse", seat)

    def _collect(self) -> None:
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=WAIT_S)
        for reference in ready:
            call = self._calls.pop(reference)
            try:
                self._settle(call, ray.get(reference))
            except RayActorError as error:
                self._worker_lost(call.seat, str(error))

    def _settle(self, call: _Call, answer: Any) -> None:
        if isinstance(answer, LoadOutcome):
            self._loaded(call.seat, answer)
        elif isinstance(answer, ShardOutcome) and call.shard is not None:
            call.seat.in_hand.remove(call.shard)
            self._attempted(call.shard, answer)
        else:
            call.seat.live_counts = answer

    def _loaded(self, seat: _Seat, outcome: LoadOutcome) -> None:
        if outcome.message:
            raise UserError(outcome.message)
        self._load_deaths = 0
        seat.node_id = ray.get(seat.actor.node_id.remote())
        seat.ready = True

    def _attempted(self, shard: ShardSource, outcome: ShardOutcome) -> None:
        if outcome.status == "fatal":
            raise OutputError(outcome.message)
        if outcome.report is not None:
            self._done(shard, outcome.report.counts)
            return
        self._progress.say(f"{shard.canonical_url}: attempt failed: {outcome.message}")
        given_up = self._queue.attempt_failed(shard, outcome.message, time.monotonic())
        if given_up is not None:
            self._give_up(given_up)

    def _done(self, shard: ShardSource, counts: ShardCounts) -> None:
        jobs.forget_failure(self._job.config.output.dir, shard.shard_id)
        state = self._state
        self._state = replace(state, shards_done=state.shards_done + 1, counts=state.counts + counts)

    def _give_up(self, given_up: GivenUp) -> None:
        shard = given_up.shard
        jobs.record_failure(self._job.config.output.dir, shard, given_up.attempts, given_up.message)
        self._failed.append((shard.canonical_url, given_up.message))
        self._state = replace(self._state, shards_failed=self._state.shards_failed + 1)
        self._progress.say(f"{shard.canonical_url}: given up after {given_up.attempts} attempt(s)")

    def _worker_lost(self, seat: _Seat, message: str) -> None:
        if seat not in self._seats:
            return
        ray.kill(seat.actor)
        self._seats.remove(seat)
        self._calls = {reference: call for reference, call in self._calls.items() if call.seat is not seat}
        if not seat.ready:
            self._load_deaths += 1
            if self._load_deaths >= MAX_LOAD_DEATHS:
                raise WorkersDied(f"{self._load_deaths} workers in a row died while they loaded: {message}")
        self._take_back(seat, message.strip().splitlines()[0] if message.strip() else "the worker died")
        self._hire()

    def _take_back(self, seat: _Seat, message: str) -> None:
        unpublished = [shard for shard in seat.in_hand if not self._found_published(shard)]
        if seat.ready and not _is_alive(seat.node_id):
            self._progress.say("a machine was lost; its shards go to other workers")
            self._queue.node_lost(unpublished)
            return
        if unpublished:
            names = ", ".join(shard.canonical_url for shard in unpublished)
            self._progress.say(f"a worker died and is replaced; it had in hand: {names}")
        for given_up in self._queue.worker_died(unpublished, f"the worker died: {message}"):
            self._give_up(given_up)

    def _found_published(self, shard: ShardSource) -> bool:
        out = self._job.config.output.dir
        if not storage.exists(storage.join_url(out, "annotations"), f"{shard.shard_id}.parquet"):
            return False
        self._done(shard, published_counts(out, shard.shard_id))
        return True

    def _show(self) -> None:
        live = total_counts(seat.live_counts for seat in self._seats if seat.in_hand)
        ready = sum(seat.ready for seat in self._seats)
        elapsed_s = time.monotonic() - self._started_s
        self._state = replace(self._state, live_counts=live, workers_ready=ready, elapsed_s=elapsed_s)
        self._progress.update(self._state)

    def _reason_to_stop(self) -> str:
        run, counts, given_up = self._job.config.run, self._state.counts, self._state.shards_failed
        if run.max_failed_shards is not None and given_up > run.max_failed_shards:
            return f"{given_up} shards given up; run.max_failed_shards is {run.max_failed_shards}"
        if counts.samples_in < BUDGET_SAMPLES or counts.failed <= run.error_budget * counts.samples_in:
            return ""
        kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(counts.errors_by_kind.items()))
        return (
            f"{counts.failed} of {counts.samples_in} samples failed; "
            f"run.error_budget is {run.error_budget:g} ({kinds})"
        )


def _is_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())
