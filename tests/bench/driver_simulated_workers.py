"""CPU time of the driver with Ray's real calls; few actors answer for many simulated workers, without files.

    python tests/bench/driver_simulated_workers.py [--workers 64 1000] [--shard-s 30] [--write]

The dispatcher and its Ray host are the real ones, and every request to a worker and every answer is a call of
a real actor, on this machine. Each of these actors answers for its part of the workers, in asynchronous
methods: a worker has a device that annotates one shard after the other, for a time drawn from a lognormal
distribution around `shard-s`, and room for two. Left out: processes of the workers, so that many fit on one
machine, their machines (Ray sees one), and files (the tally counts in memory). One JSON row:

    driver_busy_share   CPU time of the driver's process, Ray's threads in it included, over the time, from
                        the first shard's end until the last shards are begun
    driver_ms_a_shard   the same CPU time for each shard
    efficiency          shards' time on devices / (workers x time from the first worker's start to the end)

`cluster_simulation.py` measures the dispatcher alone, on clusters that change.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import ray
from published import figure_parser, recording

from pipeline.annotate.annotator import ShardProgress, ShardReport
from pipeline.output.counts import ShardCounts
from pipeline.output.measures import Measures
from pipeline.output.runs import RunState
from pipeline.run import cluster
from pipeline.run.dispatcher import Dispatcher
from pipeline.run.outcome import RunTally
from pipeline.run.plan import MachineResources, WorkerShape
from pipeline.run.ray_host import RayHost, _Actor
from pipeline.run.worker import Heartbeat, LoadOutcome, ShardOutcome
from pipeline.storage import ShardSource
from tests.helpers.simulated_job import simulated_job, simulated_shards

GPUS_OF_A_MACHINE = 8
SAMPLES_PER_S = 100.0
SHARDS_WITH_ROOM = 2


class SimulatedWorkers:
    """Answers for many workers; each has a device that annotates one shard after the other."""

    def __init__(self) -> None:
        self._devices: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._changed: defaultdict[int, asyncio.Condition] = defaultdict(asyncio.Condition)
        self._in_flight: defaultdict[int, dict[str, float]] = defaultdict(dict)

    async def where(self, worker: int) -> tuple[str, str]:
        return f"m{worker // GPUS_OF_A_MACHINE}", str(worker % GPUS_OF_A_MACHINE)

    async def load(self, worker: int) -> LoadOutcome:
        return LoadOutcome()

    async def annotate(self, worker: int, shard: ShardSource) -> ShardOutcome:
        samples = (shard.size_bytes or 0) // 1000
        in_flight, changed = self._in_flight[worker], self._changed[worker]
        in_flight[shard.shard_id] = 0.0
        async with self._devices[worker]:
            in_flight[shard.shard_id] = time.monotonic()
            await asyncio.sleep(samples / SAMPLES_PER_S)
        del in_flight[shard.shard_id]
        async with changed:
            changed.notify_all()
        counts = ShardCounts(annotated=samples, rows=samples)
        return ShardOutcome("done", ShardReport(counts, samples / SAMPLES_PER_S))

    async def wait_for_room(self, worker: int) -> None:
        async with self._changed[worker]:
            await self._changed[worker].wait_for(lambda: len(self._in_flight[worker]) < SHARDS_WITH_ROOM)

    async def heartbeat(self, worker: int) -> Heartbeat:
        now_s = time.monotonic()
        progress = {
            name: ShardProgress(
                ShardCounts(annotated=int((now_s - begun_s) * SAMPLES_PER_S if begun_s else 0))
            )
            for name, begun_s in self._in_flight[worker].items()
        }
        return Heartbeat(progress, Measures(ready_s=1.0))

    async def abandon(self, worker: int, shard: ShardSource) -> bool:
        return False


class Method:
    """A method of a shared actor, called for one worker."""

    def __init__(self, method: Any, worker: int) -> None:
        self._method, self._worker = method, worker

    def options(self, **settings: Any) -> Method:
        return Method(self._method.options(**settings), self._worker)

    def remote(self, *arguments: Any) -> Any:
        return self._method.remote(self._worker, *arguments)


class WorkerHandle:
    """Looks like the handle of a worker's own actor."""

    def __init__(self, actor: Any, worker: int) -> None:
        self._actor, self._worker = actor, worker

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self._actor, name), self._worker)


class SharedActorsHost(RayHost):
    """A RayHost whose workers share a few actors, on machines that are only named."""

    def __init__(self, config: Any, actors: Sequence[Any], workers: int) -> None:
        super().__init__(config, {}, "simulated", lambda *_: None)
        self._shared = actors
        machines = -(-workers // GPUS_OF_A_MACHINE)
        self._simulated_machines = [
            MachineResources(32, GPUS_OF_A_MACHINE, f"m{number}") for number in range(machines)
        ]

    def machines(self) -> Sequence[MachineResources]:
        return self._simulated_machines

    def start(self, worker: int, shape: WorkerShape) -> None:
        handle = WorkerHandle(self._shared[worker % len(self._shared)], worker)
        self._actors[worker] = _Actor(worker, handle, shape.node_id)
        self._call(self._actors[worker], "where", handle.where.remote())

    def stop(self, worker: int) -> None:
        self._actors.pop(worker, None)


class Observer:
    """Notes time and CPU time when the first shard is done, and when the last one has been begun."""

    def __init__(self, shards: int, workers: int) -> None:
        self._last_start = shards - SHARDS_WITH_ROOM * workers
        self.seen: list[tuple[int, float, float]] = []

    def update(self, state: RunState) -> None:
        if 0 < state.shards_done <= self._last_start:
            self.seen.append((state.shards_done, time.perf_counter(), time.process_time()))

    def say(self, message: str) -> None:
        print(message, file=sys.stderr)


def main() -> None:
    """Measure the driver with each number of workers."""
    parser = figure_parser(__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[64, 1000])
    parser.add_argument("--shards-a-worker", type=int, default=4)
    parser.add_argument("--shard-s", type=float, default=30.0, help="mean time of a shard on the device")
    parser.add_argument("--actors", type=int, default=2, help="real actors that answer for the workers")
    arguments = parser.parse_args()
    with recording(__file__, arguments) as record:
        for workers in arguments.workers:
            shards = arguments.shards_a_worker * workers
            record("runs", measured(workers, shards, arguments.shard_s, arguments.actors))


def measured(workers: int, shards: int, shard_s: float, actors: int) -> dict[str, Any]:
    """Return the row of a run."""
    settings = {"workers": workers, "shards": shards, "shard_s": shard_s, "actors": actors}
    rng = random.Random(1)
    # the mean of a lognormal distribution with this spread is 1.03 times its median
    samples = [round(shard_s / 1.03 * SAMPLES_PER_S * rng.lognormvariate(0, 0.25)) for _ in range(shards)]
    observer = Observer(shards, workers)
    sources = simulated_shards(samples)
    job = simulated_job(sources, lambda shard_id: False)
    # actors import what they run from here
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(
            None, [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
        )
    )
    with cluster.ray_session():
        remote = ray.remote(SimulatedWorkers).options(num_cpus=0, max_concurrency=10 * workers)
        host = SharedActorsHost(job.config, [remote.remote() for _ in range(actors)], workers)
        end = Dispatcher(job.config.run, sources, host, RunTally(job, observer), observer).run()
    if end.state.shards_done != shards:
        raise RuntimeError(f"{end.state.shards_done} of {shards} shards are done")
    first, last = observer.seen[0], observer.seen[-1]
    elapsed_s, cpu_s = last[1] - first[1], last[2] - first[2]
    return {
        **settings,
        "elapsed_s": round(elapsed_s, 1),
        "driver_busy_share": round(cpu_s / elapsed_s, 4),
        "driver_ms_a_shard": round(1000 * cpu_s / (last[0] - first[0]), 2),
        "efficiency": round(sum(samples) / SAMPLES_PER_S / workers / end.state.working_s, 3),
    }


if __name__ == "__main__":
    main()
