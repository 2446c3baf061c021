"""Machines of a simulated cluster, and how Ray reserves their CPU cores and GPUs for workers."""

from dataclasses import dataclass

from pipeline.run.hosting import Place
from pipeline.run.plan import WorkerShape

ROUNDING = 1e-9


@dataclass(frozen=True)
class SimulatedMachine:
    """A machine, and when it is part of the cluster.

    Attributes:
        node_id: Ray's id of it.
        cpus: CPU cores.
        gpus: GPUs.
        joins_s: when it joins.
        drains_s: from when Ray drains it; None: never.
        leaves_s: when it is gone, with its workers; None: never.
        speed: of its devices, relative to others.
    """

    node_id: str
    cpus: int
    gpus: int = 0
    joins_s: float = 0.0
    drains_s: float | None = None
    leaves_s: float | None = None
    speed: float = 1.0

    @property
    def host(self) -> str:
        """Address of the machine."""
        return f"host-{self.node_id}"


class Reservations:
    """What of a machine is reserved: CPU cores, and the share of each GPU, the lowest free one first."""

    def __init__(self, machine: SimulatedMachine) -> None:
        self.machine = machine
        self.free_cpus = machine.cpus
        self.free_gpus = [1.0] * machine.gpus

    def reserve(self, shape: WorkerShape) -> Place | None:
        """Return the place of a worker and reserve its resources; None if there is no room."""
        if shape.cpus > self.free_cpus:
            return None
        device = ""
        if shape.gpus:
            free = [gpu for gpu, share in enumerate(self.free_gpus) if share >= shape.gpus - ROUNDING]
            if not free:
                return None
            device = str(free[0])
            self.free_gpus[free[0]] -= shape.gpus
        self.free_cpus -= shape.cpus
        return Place(self.machine.node_id, self.machine.host, device)

    def release(self, shape: WorkerShape, place: Place) -> None:
        """Free a worker's resources."""
        self.free_cpus += shape.cpus
        if place.device:
            self.free_gpus[int(place.device)] += shape.gpus
