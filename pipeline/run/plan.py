"""Plan which workers a run starts, and the CPU cores and GPUs of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.config.schema import RunConfig
from pipeline.errors import UserError

# What a GPU is assumed to need, for images of 500x375 pixels with one prompt each; only notes depend on it.
# Both are targets: no device step was measured on a GPU, and the CPU time is the one that a worker is to stay
# below. `tests/bench/host_ceiling.py` measures it, for images and prompts as they are given to it.
SAMPLES_PER_S_OF_A_GPU = 4_000
CPU_MS_PER_SAMPLE = 2.0
CORES_PER_GPU_NEEDED = math.ceil(SAMPLES_PER_S_OF_A_GPU * CPU_MS_PER_SAMPLE / 1000)
# not measured: with many more sample processes, they would wait for the one process that holds the device
MOST_CPUS_PER_WORKER = 32
# a CPU worker's device step does not become faster with more cores than this; each worker holds a model
CPUS_OF_A_CPU_WORKER = 8


@dataclass(frozen=True)
class MachineResources:
    """What a machine of the cluster has for workers.

    Attributes:
        cpus: CPU cores.
        gpus: GPUs.
        node_id: Ray's id of the machine.
    """

    cpus: int
    gpus: int = 0
    node_id: str = ""


@dataclass(frozen=True)
class WorkerShape:
    """Resources of a worker.

    Attributes:
        cpus: CPU cores.
        gpus: GPUs, or the share of one; 0 for a CPU worker.
        node_id: machine that the worker is meant for; empty: any.
    """

    cpus: int
    gpus: float = 0.0
    node_id: str = ""

    @property
    def device(self) -> str:
        """Torch device of the worker; Ray shows a GPU worker only its own device."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True)
class WorkerPlan:
    """The workers of a run.

    Attributes:
        shapes: resources of each worker; at least one.
        notes: a line for each reason why GPUs get no worker, or too few CPU cores.
    """

    shapes: tuple[WorkerShape, ...]
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """Torch device of all workers."""
        return self.shapes[0].device

    @property
    def cpus_text(self) -> str:
        """The CPU cores of a worker, for display: one number, or the smallest and the largest."""
        return _range_text([shape.cpus for shape in self.shapes])


@dataclass(frozen=True)
class _Share:
    """What of a machine is used.

    Attributes:
        machine: the machine.
        capacity: workers that it can hold.
        workers: workers that are planned on it.
        workers_per_gpu: workers that share a GPU; 0 for CPU workers.
    """

    machine: MachineResources
    capacity: int
    workers: int
    workers_per_gpu: int

    @property
    def idle_for_lack_of_cpus(self) -> int:
        """GPUs for whose workers the machine has too few CPU cores."""
        return self.machine.gpus - self._gpus_of(self.capacity)

    @property
    def idle_for_lack_of_workers(self) -> int:
        """GPUs that could have a worker and get none."""
        return self._gpus_of(self.capacity) - self._gpus_of(self.workers)

    def _gpus_of(self, workers: int) -> int:
        return math.ceil(workers / self.workers_per_gpu) if self.workers_per_gpu else self.machine.gpus


def plan_workers(run: RunConfig, machines: Sequence[MachineResources], shards: int) -> WorkerPlan:
    """Divide each machine's devices and CPU cores among workers: GPU workers if the cluster has GPUs.

    Without `run.cpus_per_worker`, the workers on a machine share its cores, so that workers on different
    machines may have different numbers of them.

    Args:
        run: the configuration's run section.
        machines: the machines that are alive.
        shards: number of shards to annotate, the largest useful number of workers.

    Raises:
        UserError: no machine has the resources that a worker needs.
    """
    gpus = run.gpus_per_worker if any(machine.gpus for machine in machines) else 0.0
    usable = [machine for machine in machines if machine.gpus or not gpus]
    per_gpu = _workers_per_gpu(gpus)
    capacities = [_capacity(run, machine, per_gpu) for machine in usable]
    if not any(capacities):
        raise _no_room(run, usable)
    total = min(run.workers or sum(capacities), sum(capacities), shards)
    numbers = _spread(usable, capacities, total)
    shares = [
        _Share(machine, capacity, workers, per_gpu)
        for machine, capacity, workers in zip(usable, capacities, numbers, strict=True)
    ]
    shapes = tuple(_shapes(run, shares, gpus))
    return WorkerPlan(shapes, (*_idle_gpu_notes(run, shares, shards), *_cpu_notes(shapes)))


def _workers_per_gpu(gpus: float) -> int:
    # Ray gives a worker its share of a single GPU; 1 / 0.1 must be 10
    return math.floor(1 / gpus + 1e-9) if gpus else 0


def _capacity(run: RunConfig, machine: MachineResources, workers_per_gpu: int) -> int:
    """Return the largest useful number of workers on a machine."""
    by_cpus = machine.cpus // (run.cpus_per_worker or 1)
    if workers_per_gpu:
        return min(by_cpus, machine.gpus * workers_per_gpu)
    if run.cpus_per_worker or run.workers:
        return by_cpus
    return min(by_cpus, max(1, machine.cpus // CPUS_OF_A_CPU_WORKER))


def _no_room(run: RunConfig, machines: Sequence[MachineResources]) -> UserError:
    most = max((machine.cpus for machine in machines), default=0)
    kind = "machine with GPUs" if any(machine.gpus for machine in machines) else "machine"
    return UserError(
        f"run.cpus_per_worker is {run.cpus_per_worker or 1}; the largest {kind} has {most} CPU core(s)"
    )


def _spread(machines: Sequence[MachineResources], capacities: Sequence[int], workers: int) -> list[int]:
    """Return the number of workers on each machine: each is put where it gets the most CPU cores."""
    numbers = [0] * len(machines)
    for _ in range(workers):
        places = [place for place, capacity in enumerate(capacities) if numbers[place] < capacity]
        best = max(places, key=lambda place: machines[place].cpus / (numbers[place] + 1))
        numbers[best] += 1
    return numbers


def _shapes(run: RunConfig, shares: Sequence[_Share], gpus: float) -> Iterator[WorkerShape]:
    used = [share for share in shares if share.workers]
    cpus = [
        run.cpus_per_worker or min(MOST_CPUS_PER_WORKER, share.machine.cpus // share.workers)
        for share in used
    ]
    # workers that are all alike fit wherever Ray places them
    pinned = len(set(cpus)) > 1
    for share, worker_cpus in zip(used, cpus, strict=True):
        node_id = share.machine.node_id if pinned else ""
        yield from [WorkerShape(worker_cpus, gpus, node_id)] * share.workers


def _idle_gpu_notes(run: RunConfig, shares: Sequence[_Share], shards: int) -> Iterator[str]:
    for cpus in sorted({share.machine.cpus for share in shares if share.idle_for_lack_of_cpus}):
        alike = [share for share in shares if share.machine.cpus == cpus and share.idle_for_lack_of_cpus]
        idle = sum(share.idle_for_lack_of_cpus for share in alike)
        gpus = sum(share.machine.gpus for share in alike)
        lower = max(1, min(cpus // (share.machine.gpus * share.workers_per_gpu) for share in alike))
        found = f"{idle} of {gpus} GPUs get no worker on machines with {cpus} cores"
        if run.cpus_per_worker is None or lower == run.cpus_per_worker:
            yield f"{found}: a worker takes at least one core"
        else:
            yield f"run.cpus_per_worker {run.cpus_per_worker}: {found}; lower it to {lower} or leave it out"
    gpus = sum(share.machine.gpus for share in shares)
    idle = sum(share.idle_for_lack_of_workers for share in shares)
    if idle:
        reason = (
            f"run.workers {run.workers}" if run.workers and run.workers < shards else f"{shards} shard(s)"
        )
        yield f"{reason}: {idle} of {gpus} GPUs get no worker"
    elif gpus and not run.gpus_per_worker:
        yield f"run.gpus_per_worker 0: {gpus} of {gpus} GPUs get no worker"


def _cpu_notes(shapes: Sequence[WorkerShape]) -> Iterator[str]:
    short = [shape.cpus for shape in shapes if shape.cpus < shape.gpus * CORES_PER_GPU_NEEDED]
    if short:
        yield (
            f"{len(short)} of {len(shapes)} worker(s) get {_range_text(short)} CPU core(s) each; keeping a "
            f"GPU busy takes about {CORES_PER_GPU_NEEDED}, for {SAMPLES_PER_S_OF_A_GPU:,} samples/s at "
            f"{CPU_MS_PER_SAMPLE:g} ms of CPU a sample (tests/bench/host_ceiling.py measures yours)"
        )


def _range_text(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"
