"""Efficiency and CPU time of the dispatcher on simulated clusters; left out: Ray itself and all files.

    python tests/bench/cluster_simulation.py [--scenarios NAME ...] [--write]

The dispatcher is the real one. The cluster has a virtual clock; workers, devices and faults are simulated
(tests/helpers/simulated_host.py, cluster_scenarios.py). What the dispatcher computes passes on that clock as
well, so what happens meanwhile waits for it, as in a real run. What Ray's calls cost the driver is measured
by `driver_simulated_workers.py`. Prints one JSON row a scenario:

    efficiency          ideal time over time. The ideal: the larger of two times. One in which usable devices
                        do all samples that were published or lost with their machines, without a pause from
                        when a worker could be ready (its machine has joined, its process has started and its
                        model is loaded) until the machine leaves; and one in which a worker starts and does
                        the largest shard. Work repeated for any other reason counts against the run.
    given_up            shards given up; all are good
    started_at_bad      workers started at bad places
    driver_ms_a_shard   CPU time of the dispatcher for each shard, what the simulation takes subtracted
    driver_busy_share   that CPU time over the simulated time
    duration_s          simulated time
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from published import figure_parser, recording

from tests.helpers import cluster_scenarios as scenarios
from tests.helpers.simulated_host import SimulatedHost

SCENARIOS: dict[str, tuple[str, Callable[[], scenarios.Scenario]]] = {
    "large_cluster": (
        "8 machines of 8 GPUs, 20,000 shards of 41 s in the mean and up to 1,000 s; a GPU kills each worker "
        "2 s after it takes a shard; one machine is lost in the middle and replaced 5 minutes later",
        scenarios.large_cluster,
    ),
    "large_cluster_bad_machine": (
        "the same, and all GPUs of another machine kill their workers",
        scenarios.large_cluster_with_a_bad_machine,
    ),
    "one_bad_machine_of_four": (
        "4 machines of one GPU, 240 shards of 4 s; one machine kills each worker 1 s after it takes a shard",
        scenarios.one_bad_machine_of_four,
    ),
    "one_large_shard_at_the_end": (
        "8 GPUs, 80 shards of 0.4 s and, last in the list, one of 8 s; models load in no time",
        scenarios.one_large_shard_at_the_end,
    ),
    "many_workers": (
        "125 machines of 8 GPUs, 20,000 shards of 30 s in the mean and up to 120 s",
        scenarios.many_workers,
    ),
}


class Meter:
    """Stands between the dispatcher and the cluster, and measures the CPU time that the dispatcher takes."""

    def __init__(self, host: SimulatedHost) -> None:
        self._host = host
        self._left_s = time.process_time()
        self._passed_s = 0.0
        self.driver_cpu_s = 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._host, name)
        clock = time.process_time

        def metered(*arguments: Any) -> Any:
            self.driver_cpu_s += clock() - self._left_s
            try:
                return method(*arguments)
            finally:
                self._left_s = clock()

        setattr(self, name, metered)
        return metered

    def events(self, timeout_s: float) -> Any:
        """Let the time that the dispatcher has computed since its last call pass for the cluster too."""
        self.driver_cpu_s += time.process_time() - self._left_s
        self._host.pass_time(self.driver_cpu_s - self._passed_s)
        self._passed_s = self.driver_cpu_s
        try:
            return self._host.events(timeout_s)
        finally:
            self._left_s = time.process_time()


def main() -> None:
    """Measure the chosen scenarios."""
    parser = figure_parser(__doc__)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    arguments = parser.parse_args()
    with recording(__file__, arguments) as record:
        for name in arguments.scenarios:
            record("scenarios", measured(name))


def measured(name: str) -> dict[str, Any]:
    """Run a scenario and return its row."""
    scenario = SCENARIOS[name][1]()
    meters: list[Meter] = []

    def observed(host: SimulatedHost) -> Any:
        meters.append(Meter(host))
        return meters[0]

    run = scenarios.run_scenario(scenario, observed)
    if run.error is not None:
        raise run.error
    cpu_s = meters[0].driver_cpu_s
    return {
        "scenario": name,
        "what": SCENARIOS[name][0],
        "workers_most": max(1, sum(machine.gpus for machine in scenario.machines)),
        "shards": len(scenario.samples),
        "efficiency": round(run.efficiency, 4),
        "given_up": len(run.given_up),
        "left": len(scenario.samples) - len(run.published) - len(run.given_up),
        "started_at_bad": run.started_at(lambda place: not scenario.is_usable(place)),
        "driver_ms_a_shard": round(1000 * cpu_s / len(scenario.samples), 3),
        "driver_busy_share": round(cpu_s / run.duration_s, 4),
        "duration_s": round(run.duration_s, 2),
    }


if __name__ == "__main__":
    main()
