"""Run workers as Ray actors. Answers arrive by callbacks, so a call costs the same beside many others."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.config.schema import JobConfig
from pipeline.run import cluster
from pipeline.run.cluster import Machine
from pipeline.run.hosting import Abandoned, Ended, Event, HasRoom, Heard, Loaded, Lost, Place, Started
from pipeline.run.plan import MachineResources, WorkerShape
from pipeline.run.worker import AnnotatorFactory, Heartbeat, LoadOutcome, ShardOutcome, Worker
from pipeline.storage import ShardSource

MACHINE_CHECK_S = 2.0
UNREACHABLE_MACHINE_CHECK_S = 30.0
MACHINE_CHECK_INTERVAL_S = 0.5
logger = logging.getLogger(__name__)

# group of the methods that have threads of their own: one may wait for room, the others answer at once
CONTROL = "control"
CONTROL_THREADS = 4
# an abandoned shard may keep its thread for ever
SPARE_THREADS = 4


class LegradWorker:
    """A worker as a Ray actor; it also reports its place, and answers while its other threads are busy."""

    def __init__(
        self, config: JobConfig, metadata: Mapping[str, Any], shape: WorkerShape, factory: AnnotatorFactory
    ) -> None:
        self._worker = Worker(config, metadata, cpus=shape.cpus, device=shape.device, factory=factory)

    def load(self) -> LoadOutcome:
        """Load the model."""
        return self._worker.load()

    def annotate(self, shard: ShardSource) -> ShardOutcome:
        """Annotate one shard."""
        return self._worker.annotate(shard)

    @ray.method(concurrency_group=CONTROL)
    def where(self) -> tuple[str, str]:
        """Return Ray's id of the machine, and the number of the GPU; without a GPU, an empty text."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return str(context.get_node_id()), ",".join(map(str, gpus))

    @ray.method(concurrency_group=CONTROL)
    def heartbeat(self) -> Heartbeat:
        """Return the progress of the shards in flight."""
        return self._worker.heartbeat()

    @ray.method(concurrency_group=CONTROL)
    def abandon(self, shard: ShardSource) -> bool:
        """Return whether the shard will certainly not be published."""
        return self._worker.abandon(shard)

    @ray.method(concurrency_group=CONTROL)
    def wait_for_room(self) -> None:
        """Return once the worker would begin another shard at once."""
        self._worker.wait_for_room()


@dataclass(eq=False)
class _Actor:
    """An actor that was requested and not stopped.

    Attributes:
        number: of the worker.
        handle: Ray's.
        node_id: of the machine that it was requested for; empty: any.
        machine: where it runs, once it does.
    """

    number: int
    handle: Any
    node_id: str
    machine: Machine | None = None


@dataclass(frozen=True)
class _Answer:
    """The end of a call."""

    actor: _Actor
    shard: ShardSource | None
    kind: str
    future: Future[Any]


@dataclass(frozen=True)
class _Death:
    """A lost actor of which it is not known yet whether its machine is lost as well."""

    actor: _Actor
    cause: str
    decide_by_s: float


class RayHost:
    """A `WorkerHost` on the Ray cluster that this process is connected to.

    Args:
        config: the job's configuration.
        metadata: for the footers of the Parquet files.
        run_id: of the run; actors are named after it.
        factory: builds the annotator inside each worker.
    """

    def __init__(
        self, config: JobConfig, metadata: Mapping[str, Any], run_id: str, factory: AnnotatorFactory
    ) -> None:
        self._config = config
        self._metadata = metadata
        self._run_id = run_id
        self._factory = factory
        as_actors: Any = ray.remote
        self._actor_class = as_actors(concurrency_groups={CONTROL: CONTROL_THREADS})(LegradWorker)
        self._actors: dict[int, _Actor] = {}
        self._answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._machines: dict[str, Machine] = {}
        self._deaths: list[_Death] = []
        self._refused: list[Ended] = []
        self._next_check_s = 0.0

    def now_s(self) -> float:
        """Return a monotonic time in seconds."""
        return time.monotonic()

    def machines(self) -> Sequence[MachineResources]:
        """Return the machines that are alive."""
        return cluster.machines_alive()

    def start(self, worker: int, shape: WorkerShape) -> None:
        """Request an actor; pending requests are demand that Ray's autoscaler sees."""
        threads = self._config.run.shards_in_flight + SPARE_THREADS
        handle = self._actor_class.options(
            name=f"legrad {self._run_id} worker {worker}",
            num_cpus=shape.cpus,
            num_gpus=shape.gpus,
            scheduling_strategy=cluster.placed_on(shape.node_id),
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=threads,
        ).remote(self._config, self._metadata, shape, self._factory)
        actor = _Actor(worker, handle, shape.node_id)
        self._actors[worker] = actor
        self._call(actor, "where", handle.where.remote())

    def load(self, worker: int) -> None:
        """Ask a worker to load its model."""
        if actor := self._actors.get(worker):
            self._call(actor, "load", actor.handle.load.remote())

    def annotate(self, worker: int, shard: ShardSource) -> None:
        """Ask a worker to annotate a shard; the dashboard shows the shard as the name of the task."""
        if actor := self._actors.get(worker):
            name = f"annotate {PurePosixPath(shard.canonical_url).name}"
            self._call(actor, "annotate", actor.handle.annotate.options(name=name).remote(shard), shard)
        else:
            # lost, and only the host knows: the shard was never there
            self._refused.append(Ended(worker, shard, ShardOutcome("abandoned")))

    def wait_for_room(self, worker: int) -> None:
        """Ask when a worker would begin another shard."""
        if actor := self._actors.get(worker):
            self._call(actor, "room", actor.handle.wait_for_room.remote())

    def heartbeat(self, worker: int) -> None:
        """Ask a worker for its progress."""
        if actor := self._actors.get(worker):
            self._call(actor, "heartbeat", actor.handle.heartbeat.remote())

    def abandon(self, worker: int, shard: ShardSource) -> None:
        """Ask a worker not to publish a shard."""
        if actor := self._actors.get(worker):
            self._call(actor, "abandon", actor.handle.abandon.remote(shard), shard)

    def stop(self, worker: int) -> None:
        """Kill an actor, or withdraw the request for it."""
        actor = self._actors.pop(worker, None)
        if actor is not None:
            ray.kill(actor.handle)

    def events(self, timeout_s: float) -> Sequence[Event]:
        """Return what happened since the last call; wait for something, at most so long."""
        refused, self._refused = self._refused, []
        answers = []
        try:
            answers.append(self._answers.get(timeout=0 if refused else timeout_s))
            while True:
                answers.append(self._answers.get_nowait())
        except queue.Empty:
            pass
        events = [event for answer in answers if (event := self._event(answer)) is not None]
        return [*refused, *events, *self._decided_deaths()]

    def _call(self, actor: _Actor, kind: str, reference: Any, shard: ShardSource | None = None) -> None:
        future: Future[Any] = reference.future()
        future.add_done_callback(lambda done: self._answers.put(_Answer(actor, shard, kind, done)))

    def _event(self, answer: _Answer) -> Event | None:
        actor, number = answer.actor, answer.actor.number
        if self._actors.get(number) is not actor:
            return None  # it was stopped, or lost a moment ago
        error = answer.future.exception()
        if isinstance(error, RayTaskError):
            # a bug, or a process out of memory or threads: workers return failures as values
            logger.error("worker %d: %s", number, error)
            self._note_death(actor, cluster.loss_cause(error.cause))
            return None
        if isinstance(error, RayError):
            # not only RayActorError: Ray's memory monitor kills a worker with an OutOfMemoryError
            self._note_death(actor, cluster.loss_cause(error))
            return None
        if error is not None:
            raise error
        return self._answered(answer, answer.future.result())

    def _answered(self, answer: _Answer, value: Any) -> Event:
        actor, number, shard = answer.actor, answer.actor.number, answer.shard
        if answer.kind == "where":
            node_id, device = value
            if node_id not in self._machines:
                self._machines[node_id] = cluster.find_machine(ray.nodes(), node_id)
            actor.machine = self._machines[node_id]
            return Started(number, Place(node_id, actor.machine.host, device))
        if isinstance(value, LoadOutcome):
            return Loaded(number, value)
        if isinstance(value, Heartbeat):
            return Heard(number, value)
        if isinstance(value, ShardOutcome) and shard is not None:
            return Ended(number, shard, value)
        if answer.kind == "abandon" and shard is not None:
            return Abandoned(number, shard, bool(value))
        return HasRoom(number)

    def _note_death(self, actor: _Actor, cause: str) -> None:
        self.stop(actor.number)
        # a machine that goes down takes its worker first
        is_unreachable = actor.machine is not None and actor.machine.port is None
        check_s = UNREACHABLE_MACHINE_CHECK_S if is_unreachable else MACHINE_CHECK_S
        self._deaths.append(_Death(actor, cause, time.monotonic() + check_s))

    def _decided_deaths(self) -> list[Lost]:
        now_s = time.monotonic()
        if not self._deaths or now_s < self._next_check_s:
            return []
        self._next_check_s = now_s + MACHINE_CHECK_INTERVAL_S
        nodes, lost, undecided = ray.nodes(), [], []
        concerned = {_machine_of(death.actor) for death in self._deaths}
        lost_machines = {machine for machine in concerned if cluster.machine_is_lost(nodes, machine)}
        for death in self._deaths:
            machine = _machine_of(death.actor)
            machine_lost = bool(machine.node_id) and machine in lost_machines
            if machine_lost or death.actor.machine is None or now_s >= death.decide_by_s:
                lost.append(Lost(death.actor.number, death.cause, machine_lost))
            else:
                undecided.append(death)
        self._deaths = undecided
        return lost


def _machine_of(actor: _Actor) -> Machine:
    """Return where an actor runs, or should have run."""
    return actor.machine or Machine(actor.node_id)
