"""What happened in a simulated run, and how long it would have taken at best."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline.run.hosting import Place
from tests.helpers.simulated_machines import SimulatedMachine
from tests.helpers.simulated_worker import WorkerTimes


@dataclass(frozen=True)
class Put:
    """A publication of a shard."""

    worker: int
    place: Place
    when_s: float


@dataclass(frozen=True)
class Death:
    """The end of a worker that the dispatcher did not ask for."""

    worker: int
    place: Place
    when_s: float
    cause: str
    shards: tuple[str, ...]


@dataclass
class WorkDone:
    """Samples that the devices have done, by what became of them.

    Attributes:
        published: in the first publication of a shard.
        repeated: in attempts that ended otherwise: published before, abandoned, failed, stopped.
        lost_with_machines: in attempts on machines that left.
        lost_by_deaths: in attempts on workers that died alone.
    """

    published: float = 0.0
    repeated: float = 0.0
    lost_with_machines: float = 0.0
    lost_by_deaths: float = 0.0

    @property
    def total(self) -> float:
        """All samples that the devices have done."""
        return self.published + self.repeated + self.lost_with_machines + self.lost_by_deaths


@dataclass
class Records:
    """What happened, for tests and figures.

    Attributes:
        joined: machines that were part of the cluster.
        puts: publications by shard id.
        takes: places at which a shard was begun, by shard id.
        started: workers started, by place.
        loads: workers that began to load their model, by place.
        deaths: of workers that the dispatcher did not stop.
        work: samples that the devices have done.
    """

    joined: list[SimulatedMachine] = field(default_factory=list)
    puts: dict[str, list[Put]] = field(default_factory=lambda: defaultdict(list))
    takes: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    started: Counter[Place] = field(default_factory=Counter)
    loads: Counter[Place] = field(default_factory=Counter)
    deaths: list[Death] = field(default_factory=list)
    work: WorkDone = field(default_factory=WorkDone)


def ideal_s(
    records: Records,
    times: WorkerTimes,
    largest_samples: int,
    is_usable: Callable[[Place], bool] = lambda place: True,
) -> float:
    """Return the time that a run would have taken without any cost of dispatching.

    The larger of two times. One in which the devices do all samples that were published or lost with their
    machines: each usable device of a machine works without a pause, from `process_s + load_s` after the
    machine joins until it leaves. And one in which a worker starts, loads, opens, does and publishes the
    largest shard. Samples that were done in vain for another reason (deaths of workers, second attempts) are
    not part of the ideal, so they lower a run's efficiency: ideal time over time.

    Args:
        records: of the run.
        times: of its workers.
        largest_samples: of the largest shard.
        is_usable: whether a device can work at all; a place that kills every worker cannot.
    """
    samples = records.work.published + records.work.lost_with_machines
    largest_s = times.open_s + largest_samples / times.samples_per_s + times.publish_s
    start_s = times.process_s + times.load_s
    return max(_time_for(samples, _spans(records.joined, times, is_usable)), start_s + largest_s)


def _spans(
    machines: Sequence[SimulatedMachine], times: WorkerTimes, is_usable: Callable[[Place], bool]
) -> list[tuple[float, float, float]]:
    """Return of each machine when it begins and ends to work, and its samples a second."""
    spans = []
    # where there are GPUs, machines without one get no worker
    has_gpus = any(machine.gpus for machine in machines)
    for machine in machines:
        if has_gpus and not machine.gpus:
            continue
        devices = [str(gpu) for gpu in range(machine.gpus)] or [""]
        usable = sum(is_usable(Place(machine.node_id, machine.host, device)) for device in devices)
        begin_s = machine.joins_s + times.process_s + times.load_s
        end_s = float("inf") if machine.leaves_s is None else machine.leaves_s
        if end_s > begin_s:
            spans.append((begin_s, end_s, usable * times.samples_per_s * machine.speed))
    return spans


def _time_for(samples: float, spans: Sequence[tuple[float, float, float]]) -> float:
    """Return when the machines have done so many samples."""
    changes = sorted([(begin, rate) for begin, _, rate in spans] + [(end, -rate) for _, end, rate in spans])
    now_s, rate, left = 0.0, 0.0, samples
    for change_s, more in changes:
        if rate > 0 and left <= (change_s - now_s) * rate:
            break
        left -= (change_s - now_s) * rate if rate else 0.0
        now_s, rate = change_s, rate + more
    return now_s + left / rate
