"""Runs of the dispatcher on simulated clusters, which tests judge and a benchmark measures."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.errors import PipelineError
from pipeline.output.folder import FAILED
from pipeline.run.dispatcher import Dispatcher, RunEnd
from pipeline.run.hosting import Place, WorkerHost
from pipeline.run.outcome import RunTally
from tests.helpers.simulated_faults import Fault, KillsWorker, at
from tests.helpers.simulated_host import RayTimes, SimulatedHost
from tests.helpers.simulated_job import KeptProgress, SimulatedFolder, simulated_job, simulated_shards
from tests.helpers.simulated_machines import SimulatedMachine
from tests.helpers.simulated_records import ideal_s
from tests.helpers.simulated_worker import WorkerTimes

# without the start of processes and models, for comparisons with times that leave these out
NO_START = WorkerTimes(process_s=0.0, load_s=0.0, open_s=0.05, publish_s=0.05, samples_per_s=50.0)


@dataclass(frozen=True)
class Scenario:
    """A job on a cluster, and what goes wrong.

    Attributes:
        samples: of each shard, in the order of the list.
        machines: of the cluster.
        faults: what goes wrong; they count how often they strike, so a scenario serves one run.
        times, ray, reserve, failed_share: as SimulatedHost takes them.
        run: settings of the section `run`.
        is_usable: whether a place can finish any shard; what cannot is no part of the ideal.
        terminated_s: when the run is asked to end.
        time_limit_s: when a run that has not ended is a failure.
    """

    samples: Sequence[int]
    machines: Sequence[SimulatedMachine]
    faults: Sequence[Fault] = ()
    times: WorkerTimes = field(default_factory=WorkerTimes)
    ray: RayTimes = field(default_factory=RayTimes)
    reserve: Sequence[SimulatedMachine] = ()
    failed_share: Mapping[str, float] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    is_usable: Callable[[Place], bool] = lambda place: True
    terminated_s: float = float("inf")
    time_limit_s: float = 1e5

    def host(self) -> SimulatedHost:
        """Return the cluster."""
        return SimulatedHost(
            self.machines,
            self.faults,
            times=self.times,
            ray=self.ray,
            reserve=self.reserve,
            failed_share=dict(self.failed_share),
            time_limit_s=self.time_limit_s,
        )


@dataclass(frozen=True)
class Run:
    """What became of a scenario.

    Attributes:
        scenario: that was run.
        host: the cluster, with its records.
        end: how the dispatcher ended; None if it raised `error`.
        error: that the dispatcher raised.
        folder: the output folder, with the records of shards that were given up.
        messages: that the run showed.
    """

    scenario: Scenario
    host: SimulatedHost
    end: RunEnd | None
    error: PipelineError | None
    folder: SimulatedFolder
    messages: Sequence[str]

    @property
    def duration_s(self) -> float:
        """Simulated time until the run ended."""
        return self.host.now_s()

    @property
    def ideal_s(self) -> float:
        """The ideal time, as `simulated_records.ideal_s` defines it."""
        scenario = self.scenario
        return ideal_s(self.host.records, scenario.times, max(scenario.samples), scenario.is_usable)

    @property
    def efficiency(self) -> float:
        """Ideal time over time."""
        return self.ideal_s / self.duration_s

    @property
    def given_up(self) -> list[str]:
        """Ids of the shards that were given up."""
        return sorted(name.removesuffix(".json") for kind, name in self.folder.files if kind == FAILED)

    @property
    def published(self) -> list[str]:
        """Ids of the shards that were published."""
        return sorted(self.host.records.puts)

    def started_at(self, is_there: Callable[[Place], bool]) -> int:
        """Return how many workers were started at certain places."""
        return sum(count for place, count in self.host.records.started.items() if is_there(place))

    def loads_at(self, is_there: Callable[[Place], bool]) -> int:
        """Return how many workers began to load their model at certain places."""
        return sum(count for place, count in self.host.records.loads.items() if is_there(place))


def run_scenario(
    scenario: Scenario, observed: Callable[[SimulatedHost], WorkerHost] = lambda host: host
) -> Run:
    """Run the dispatcher on a simulated cluster until it ends.

    Args:
        scenario: the job and the cluster.
        observed: returns what stands between the dispatcher and the cluster.
    """
    host = scenario.host()
    shards = simulated_shards(scenario.samples)
    job = simulated_job(shards, lambda shard_id: bool(host.records.puts.get(shard_id)), scenario.run)
    progress = KeptProgress()
    dispatcher = Dispatcher(
        job.config.run,
        shards,
        observed(host),
        RunTally(job, progress),
        progress,
        is_terminated=lambda: host.now_s() >= scenario.terminated_s,
    )
    end, error = None, None
    try:
        end = dispatcher.run()
    except PipelineError as raised:
        error = raised
    return Run(scenario, host, end, error, job.folder, progress.messages)


def gpu_machines(machines: int, gpus: int) -> list[SimulatedMachine]:
    """Return machines that are there from the beginning, with four CPU cores for each GPU."""
    return [SimulatedMachine(f"m{number}", 4 * gpus, gpus) for number in range(machines)]


def heavy_tailed(shards: int, median: int, sigma: float, most: int, seed: int) -> list[int]:
    """Return the samples of shards, drawn from a lognormal distribution that is cut at `most`."""
    rng = random.Random(seed)
    return [max(1, min(most, round(median * rng.lognormvariate(0.0, sigma)))) for _ in range(shards)]


def large_cluster(
    *, machines: int = 8, gpus: int = 8, shards: int = 20_000, bad_gpus: int = 1, lost: int = 1, seed: int = 1
) -> Scenario:
    """Return a long job: bad GPUs kill each worker, machines are lost without notice and replaced.

    Shards take a median of 20 s and at most 1,000 s, and 41 s in the mean. GPU 5 of the first machines kills
    each worker 2 s after it has taken a shard. The last machines leave one after the other, spread over
    the run; each is replaced after five minutes.
    """
    samples = heavy_tailed(shards, 2_000, 1.2, 100_000, seed)
    duration_s = sum(samples) / WorkerTimes().samples_per_s / (machines * gpus)
    cluster = gpu_machines(machines, gpus)
    for number in range(lost):
        leaves_s = duration_s * (number + 1) / (lost + 1)
        old = cluster[machines - 1 - number]
        cluster[machines - 1 - number] = SimulatedMachine(old.node_id, old.cpus, old.gpus, leaves_s=leaves_s)
        cluster.append(SimulatedMachine(f"new{number}", old.cpus, old.gpus, joins_s=leaves_s + 300.0))
    bad = [at(f"m{number}", "5") for number in range(bad_gpus)]
    faults = [KillsWorker(place, after_s=2.0) for place in bad]
    return Scenario(samples, cluster, faults, is_usable=lambda place: not any(b(place) for b in bad))


def large_cluster_with_a_bad_machine() -> Scenario:
    """Return the long job, with a machine whose GPUs all kill their workers beside the bad GPU."""
    scenario = large_cluster()
    is_bad = at("m1")
    return replace(
        scenario,
        faults=[*scenario.faults, KillsWorker(is_bad, after_s=2.0)],
        is_usable=lambda place: scenario.is_usable(place) and not is_bad(place),
    )


def one_bad_machine_of_four() -> Scenario:
    """Return 240 shards on four machines, one of which kills each worker a second after it takes a shard."""
    is_bad = at("m3")
    return Scenario(
        [400] * 240,
        gpu_machines(4, 1),
        [KillsWorker(is_bad, after_s=1.0)],
        is_usable=lambda place: not is_bad(place),
    )


def one_large_shard_at_the_end() -> Scenario:
    """Return 80 shards of 20 samples and one of 400 on 8 GPUs, which need 8 s for it."""
    return Scenario([*[20] * 80, 400], gpu_machines(1, 8), times=NO_START)


def many_workers(workers: int = 1000, shards: int = 20_000, seed: int = 1) -> Scenario:
    """Return a job on many GPUs, eight a machine, whose shards take 30 s in the mean and at most 120 s."""
    samples = heavy_tailed(shards, 2_430, 0.65, 12_000, seed)
    return Scenario(samples, gpu_machines(workers // 8, 8))
