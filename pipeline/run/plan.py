"""Plan how many workers a run starts, and the CPU cores and GPUs of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.schema import RunConfig
from pipeline.errors import UserError


@dataclass(frozen=True)
class WorkerPlan:
    """Number of workers, and the resources of each.

    Attributes:
        workers: number of workers.
        cpus: CPU cores of each.
        gpus: GPUs of each; 0 for CPU workers.
    """

    workers: int
    cpus: int
    gpus: float

    @property
    def device(self) -> str:
        """Torch device of each worker; Ray shows a GPU worker only its own device."""
        return "cuda" if self.gpus else "cpu"


def plan_workers(run: RunConfig, machines: Sequence[Mapping[str, float]], shards: int) -> WorkerPlan:
    """Divide the cluster's devices among workers: GPU workers if it has GPUs, otherwise CPU workers.

    Args:
        run: the configuration's run section.
        machines: Ray's resources of each machine; a worker must fit on one of them.
        shards: number of shards to annotate, the largest useful number of workers.

    Raises:
        UserError: no machine has the resources that a worker needs.
    """
    gpus = run.gpus_per_worker if any(machine.get("GPU", 0) for machine in machines) else 0.0
    fitting = [machine for machine in machines if machine.get("GPU", 0) >= gpus]
    if not fitting:
        most_gpus = max(machine.get("GPU", 0) for machine in machines)
        raise UserError(f"run.gpus_per_worker is {gpus:g}; the largest machine has {most_gpus:g} GPU(s)")
    cluster_cpus = int(sum(machine.get("CPU", 0) for machine in fitting))
    most_cpus = int(max(machine.get("CPU", 0) for machine in fitting))
    by_gpu = sum(int(machine["GPU"] // gpus) for machine in fitting) if gpus else None
    wanted = min(run.workers or by_gpu or max(1, cluster_cpus // 8), shards)
    cpus = run.cpus_per_worker or max(1, min(8, most_cpus, cluster_cpus // wanted))
    if cpus > most_cpus:
        raise UserError(f"run.cpus_per_worker is {cpus}; the largest machine has {most_cpus} CPU core(s)")
    return WorkerPlan(min(wanted, _capacity(fitting, cpus, gpus)), cpus, gpus)


def _capacity(machines: Sequence[Mapping[str, float]], cpus: int, gpus: float) -> int:
    by_cpus = [int(machine.get("CPU", 0) // cpus) for machine in machines]
    if not gpus:
        return sum(by_cpus)
    return sum(
        min(cpu_capacity, int(machine["GPU"] // gpus))
        for cpu_capacity, machine in zip(by_cpus, machines, strict=True)
    )
