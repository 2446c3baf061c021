"""Plan how many workers each machine of a cluster gets, with how many CPU cores and which share of a GPU."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.schema import RunConfig

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
# a cluster that can grow doubles its machines with each round of requests, up to this many workers a round
MOST_ASKS = 16


@dataclass(frozen=True)
class MachineResources:
    """Resources of a machine for workers.

    Attributes:
        cpus: CPU cores.
        gpus: GPUs.
        node_id: Ray's id of the machine.
        drains: whether Ray is draining the machine; it then gets no worker.
    """

    cpus: int
    gpus: int = 0
    node_id: str = ""
    drains: bool = False


@dataclass(frozen=True)
class WorkerShape:
    """Resources of a worker.

    Attributes:
        cpus: CPU cores.
        gpus: GPUs, or the share of one; 0 for a CPU worker.
        node_id: the machine on which the worker must start; empty: any machine.
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
    """The workers of a run on the machines that are there now.

    Attributes:
        shapes_by_machine: the workers of each machine that gets any, by the machine's id.
        wanted: `run.workers`, or the number of workers that the machines hold; at most one per shard.
        ask: a worker that no machine has room for, requested so that the cluster grows.
        notes: a line for each reason why GPUs get no worker, or workers fewer CPU cores than they could use.
    """

    shapes_by_machine: Mapping[str, tuple[WorkerShape, ...]]
    wanted: int
    ask: WorkerShape
    notes: tuple[str, ...] = ()

    @property
    def shapes(self) -> tuple[WorkerShape, ...]:
        """The workers of all machines."""
        return tuple(shape for shapes in self.shapes_by_machine.values() for shape in shapes)


@dataclass(frozen=True)
class _Share:
    """The part of a machine that workers use.

    Attributes:
        machine: the machine.
        capacity: workers that it can hold.
        workers: workers that are planned on it.
        slots: the largest number of workers that this run may ever plan on it.
        workers_per_gpu: workers that share a GPU; 0 for CPU workers.
    """

    machine: MachineResources
    capacity: int
    workers: int
    slots: int
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


def plan_workers(
    run: RunConfig, machines: Sequence[MachineResources], shards: int, *, cpus_only: bool = False
) -> WorkerPlan:
    """Divide each machine's devices and CPU cores among workers.

    The plan is made again whenever machines join or leave. The CPU cores of a worker therefore depend on its
    own machine, the configuration and `shards` alone: workers of an earlier plan and of this one fit on a
    machine together. How many workers a machine gets depends on the other machines only where `run.workers`
    or the number of shards is the limit.

    Args:
        run: the configuration's run section.
        machines: the machines that are alive, in any order.
        shards: number of shards that the run annotates, the largest useful number of workers; the same in
            each call during a run.
        cpus_only: whether workers compute on CPUs although `run.gpus_per_worker` is above 0.

    Returns:
        The plan; without workers if no machine has the resources that a worker needs.
    """
    gpus = 0.0 if cpus_only else run.gpus_per_worker
    shares = _shares(run, [machine for machine in machines if not machine.drains], shards, gpus)
    shapes = {
        share.machine.node_id: share.workers * (_shape(run, share, gpus),)
        for share in shares
        if share.workers
    }
    notes = (
        *_idle_gpu_notes(run, shares, shards),
        *_idle_cpu_notes(run, shares, gpus),
        *_few_cpus_notes([shape for machine_shapes in shapes.values() for shape in machine_shapes]),
    )
    wanted = min(run.workers or sum(share.capacity for share in shares), shards)
    return WorkerPlan(shapes, wanted, _ask(run, shapes, gpus), notes)


def asks_wanted(run: RunConfig, plan: WorkerPlan, shards: int, *, is_own_ray: bool = False) -> int:
    """Return how many workers to request beside those of the plan; Ray's autoscaler sees them as demand.

    Args:
        run: the configuration's run section.
        plan: the current plan.
        shards: number of shards that are not finished.
        is_own_ray: whether this process started Ray itself, on this machine alone: no machine ever joins.
    """
    planned = len(plan.shapes)
    more = plan.wanted - planned if run.workers else min(max(1, planned), MOST_ASKS)
    return 0 if is_own_ray else max(0, min(more, shards - planned))


def no_devices_message(
    run: RunConfig, machines: Sequence[MachineResources], *, cpus_only: bool = False
) -> str:
    """Return why no machine can hold a worker, and the way out, in one line.

    Args:
        run: the configuration's run section.
        machines: the machines that are alive.
        cpus_only: whether workers compute on CPUs although `run.gpus_per_worker` is above 0.
    """
    gpus = 0.0 if cpus_only else run.gpus_per_worker
    there = [machine for machine in machines if not machine.drains]
    needs = f"{run.cpus_per_worker or 1} CPU core(s) (run.cpus_per_worker)"
    way_out = "add such a machine"
    if gpus:
        needs = f"{gpus:g} GPU (run.gpus_per_worker) and {needs}"
        way_out += ", or set run.gpus_per_worker=0 to compute on CPUs, slowly"
    most_cpus = max((machine.cpus for machine in there if machine.gpus or not gpus), default=0)
    if run.cpus_per_worker and most_cpus:
        way_out = f"set run.cpus_per_worker to {most_cpus} or less, or {way_out}"
    return f"no machine can hold a worker: a worker needs {needs}; the cluster has {_found(there)}; {way_out}"


def _found(machines: Sequence[MachineResources]) -> str:
    if not machines:
        return "no machine for workers"
    with_gpus = [machine for machine in machines if machine.gpus]
    parts = (
        _found_alike([machine for machine in machines if not machine.gpus], "no GPU"),
        _found_alike(with_gpus, f"{_range_text([machine.gpus for machine in with_gpus] or [0])} GPU(s)"),
    )
    return " and ".join(part for part in parts if part)


def _found_alike(machines: Sequence[MachineResources], gpus_text: str) -> str:
    cpus = [machine.cpus for machine in machines]
    return f"{len(cpus)} machine(s) with {_range_text(cpus)} CPU core(s) and {gpus_text}" if cpus else ""


def _shares(run: RunConfig, machines: Sequence[MachineResources], shards: int, gpus: float) -> list[_Share]:
    machines = sorted(machines, key=lambda machine: machine.node_id)
    # Ray gives a worker its share of a single GPU; 1 / 0.1 must be 10
    per_gpu = math.floor(1 / gpus + 1e-9) if gpus else 0
    capacities = [_capacity(run, machine, per_gpu) for machine in machines]
    most = min(run.workers or shards, shards)
    numbers = _spread(machines, capacities, most)
    return [
        _Share(machine, capacity, workers, min(capacity, most), per_gpu)
        for machine, capacity, workers in zip(machines, capacities, numbers, strict=True)
    ]


def _capacity(run: RunConfig, machine: MachineResources, workers_per_gpu: int) -> int:
    """Return the largest useful number of workers on a machine."""
    by_cpus = machine.cpus // (run.cpus_per_worker or 1)
    if workers_per_gpu:
        return min(by_cpus, machine.gpus * workers_per_gpu)
    if run.cpus_per_worker or run.workers:
        return by_cpus
    return min(by_cpus, max(1, machine.cpus // CPUS_OF_A_CPU_WORKER))


def _spread(machines: Sequence[MachineResources], capacities: Sequence[int], most: int) -> list[int]:
    """Return the number of workers on each machine: each is put where it has the most CPU cores to itself."""
    if sum(capacities) <= most:
        return list(capacities)
    numbers = [0] * len(machines)
    places: list[tuple[float, int]] = [
        (-machines[place].cpus, place) for place, capacity in enumerate(capacities) if capacity
    ]
    heapq.heapify(places)
    for _ in range(most):
        _, place = heapq.heappop(places)
        numbers[place] += 1
        if numbers[place] < capacities[place]:
            heapq.heappush(places, (-machines[place].cpus / (numbers[place] + 1), place))
    return numbers


def _shape(run: RunConfig, share: _Share, gpus: float) -> WorkerShape:
    # by the slots, not the workers: another plan may put more workers beside these
    cpus = run.cpus_per_worker or min(MOST_CPUS_PER_WORKER, share.machine.cpus // share.slots)
    return WorkerShape(cpus, gpus, share.machine.node_id)


def _ask(run: RunConfig, shapes: Mapping[str, tuple[WorkerShape, ...]], gpus: float) -> WorkerShape:
    # a GPU machine's cores are unknown before it is there; a CPU worker is taken to be like those planned
    planned = [] if gpus else [machine_shapes[0].cpus for machine_shapes in shapes.values()]
    return WorkerShape(run.cpus_per_worker or min(planned, default=1), gpus)


def _idle_gpu_notes(run: RunConfig, shares: Sequence[_Share], shards: int) -> Iterator[str]:
    shares = [share for share in shares if share.machine.gpus]
    for cpus in sorted({share.machine.cpus for share in shares if share.idle_for_lack_of_cpus}):
        alike = [share for share in shares if share.machine.cpus == cpus and share.idle_for_lack_of_cpus]
        yield _lack_of_cpus(run, cpus, alike)
    gpus = sum(share.machine.gpus for share in shares)
    idle = sum(share.idle_for_lack_of_workers for share in shares)
    if idle:
        reason = (
            f"run.workers {run.workers}" if run.workers and run.workers < shards else f"{shards} shard(s)"
        )
        yield f"{reason}: {idle} of {gpus} GPUs get no worker"
    elif gpus and not run.gpus_per_worker:
        yield f"run.gpus_per_worker 0: {gpus} of {gpus} GPUs get no worker"


def _lack_of_cpus(run: RunConfig, cpus: int, alike: Sequence[_Share]) -> str:
    idle = sum(share.idle_for_lack_of_cpus for share in alike)
    gpus = sum(share.machine.gpus for share in alike)
    lower = max(1, min(cpus // (share.machine.gpus * share.workers_per_gpu) for share in alike))
    found = f"{idle} of {gpus} GPUs get no worker on machines with {cpus} cores"
    if run.cpus_per_worker is None or lower == run.cpus_per_worker:
        return f"{found}: a worker takes at least one core"
    return f"run.cpus_per_worker {run.cpus_per_worker}: {found}; lower it to {lower} or leave it out"


def _idle_cpu_notes(run: RunConfig, shares: Sequence[_Share], gpus: float) -> Iterator[str]:
    used = [share for share in shares if share.workers]
    if gpus or run.cpus_per_worker or all(share.workers == share.slots for share in used):
        return
    cores = sum(share.machine.cpus for share in used)
    busy = sum(share.workers * (share.machine.cpus // share.slots) for share in used)
    better = min(share.machine.cpus // share.workers for share in used)
    yield (
        f"the workers get {busy} of {cores} CPU cores, so that any machine could hold them all; "
        f"run.cpus_per_worker={better} gives them more"
    )


def _few_cpus_notes(shapes: Sequence[WorkerShape]) -> Iterator[str]:
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
