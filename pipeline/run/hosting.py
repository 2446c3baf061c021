"""What the dispatcher asks of the system that runs its workers; Ray implements it, and tests simulate it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.run.plan import MachineResources, WorkerShape
from pipeline.run.worker import Heartbeat, LoadOutcome, ShardOutcome
from pipeline.storage import ShardSource


@dataclass(frozen=True)
class Place:
    """Where a worker runs: a machine, and a device of it.

    Attributes:
        machine_id: Ray's id of the machine.
        host: address of the machine, for display.
        device: the GPU as Ray numbers it on its machine, such as ``3``; empty on CPUs.
    """

    machine_id: str = ""
    host: str = field(default="", compare=False)
    device: str = ""

    def __str__(self) -> str:
        """Return the place for display, such as ``10.0.0.7, GPU 3``."""
        machine = self.host or self.machine_id
        return f"{machine}, GPU {self.device}" if self.device else machine


@dataclass(frozen=True)
class Started:
    """A worker's process runs, at a place; it has not loaded its model."""

    worker: int
    place: Place


@dataclass(frozen=True)
class Loaded:
    """A worker has loaded its model, or says why not."""

    worker: int
    outcome: LoadOutcome


@dataclass(frozen=True)
class Ended:
    """An attempt at a shard has ended."""

    worker: int
    shard: ShardSource
    outcome: ShardOutcome


@dataclass(frozen=True)
class HasRoom:
    """A worker would begin another shard at once."""

    worker: int


@dataclass(frozen=True)
class Heard:
    """A worker answered a request for its progress."""

    worker: int
    heartbeat: Heartbeat


@dataclass(frozen=True)
class Abandoned:
    """A worker answered a request to abandon a shard.

    Attributes:
        worker: the worker.
        shard: the shard.
        will_not_publish: whether the worker will certainly not publish it; otherwise it has done so, is doing
            so, or has ended its attempt.
    """

    worker: int
    shard: ShardSource
    will_not_publish: bool


@dataclass(frozen=True)
class Lost:
    """A worker's process ended; there are no further events of this worker.

    Attributes:
        worker: the worker.
        cause: why, in one line.
        machine_lost: whether the whole machine was lost; the host waits until it knows.
    """

    worker: int
    cause: str
    machine_lost: bool = False


Event = Started | Loaded | Ended | HasRoom | Heard | Abandoned | Lost


class WorkerHost(Protocol):
    """Runs workers, which the dispatcher numbers; requests return at once and are answered by events."""

    def now_s(self) -> float:
        """Return a monotonic time in seconds; a simulation has its own."""

    def machines(self) -> Sequence[MachineResources]:
        """Return the machines that are alive."""

    def start(self, worker: int, shape: WorkerShape) -> None:
        """Ask for a worker's process; answered by Started once there are resources for it, perhaps never."""

    def load(self, worker: int) -> None:
        """Ask a started worker to load its model; answered by Loaded."""

    def annotate(self, worker: int, shard: ShardSource) -> None:
        """Ask a loaded worker to annotate a shard, beside others; answered by Ended."""

    def wait_for_room(self, worker: int) -> None:
        """Ask when a worker would begin another shard at once; answered by HasRoom."""

    def heartbeat(self, worker: int) -> None:
        """Ask a worker for its progress; answered by Heard."""

    def abandon(self, worker: int, shard: ShardSource) -> None:
        """Ask a worker not to publish a shard; answered by Abandoned."""

    def stop(self, worker: int) -> None:
        """End a worker's process at once; there are no further events of this worker, not even Lost."""

    def events(self, timeout_s: float) -> Sequence[Event]:
        """Return the events since the last call; wait for the first one, at most so long."""
