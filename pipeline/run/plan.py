"""How many workers a run gets, and what each one holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.schema import RunConfig
from pipeline.errors import UserError


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


def plan_workers(run: RunConfig, machines: Sequence[Mapping[str, float]], shards: int) -> WorkerPlan:
    """Share the cluster's devices out: GPU workers where it has GPUs, else CPU workers.

    Args:
        run: the configuration's run section.
        machines: ray's resources of each machine; a worker must fit on one of them.
        shards: no more workers than shards are planned.

    Raises:
        UserError: no machine can hold a worker as configured.
    """
    gpus = run.gpus_per_worker if any(machine.get("GPU", 0) for machine in machines) else 0.0
    fitting = [machine for machine in machines if machine.get("GPU", 0) >= gpus]
    if not fitting:
        most_gpus = max(machine.get("GPU", 0) for machine in machines)
        raise UserError(f"run.gpus_per_worker: {gpus:g} asked for, the largest machine has {most_gpus:g}")
    cluster_cpus = int(sum(machine.get("CPU", 0) for machine in fitting))
    most_cpus = int(max(machine.get("CPU", 0) for machine in fitting))
    by_gpu = sum(int(machine["GPU"] // gpus) for machine in fitting) if gpus else None
    wanted = min(run.workers or by_gpu or max(1, cluster_cpus // 8), shards)
    cpus = run.cpus_per_worker or max(1, min(8, most_cpus, cluster_cpus // wanted))
    if cpus > most_cpus:
        raise UserError(f"run.cpus_per_worker: {cpus} asked for, the largest machine has {most_cpus}")
    return WorkerPlan(min(wanted, _places(fitting, cpus, gpus)), cpus, gpus)


def _places(machines: Sequence[Mapping[str, float]], cpus: int, gpus: float) -> int:
    by_cpus = [int(machine.get("CPU", 0) // cpus) for machine in machines]
    if not gpus:
        return sum(by_cpus)
    return sum(
        min(cpu_places, int(machine["GPU"] // gpus))
        for cpu_places, machine in zip(by_cpus, machines, strict=True)
    )
