"""Does one driver keep many workers busy? Its real loop, with Ray's calls answered by threads in its process.

    python tests/bench/driver_simulated_workers.py [--workers 64] [--shard-s 1.0] [--shards 3200]

Every simulated worker takes `shard-s` for a shard, one after the other, as a device does; the driver
assigns shards, collects, counts and shows as in any run. Ray's own cost per call is not included (see
driver_overhead.py), its latency is added: `call-s` from a call to its start. One JSON row:

    efficiency          shards x shard-s / (workers x time from the first shard's start to the last's end)
    driver_busy_share   CPU time of the whole process over that time
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from driver_overhead import Observer, job_config, write_shards
from environment import environment
from noop_annotator import SHARD_SECONDS, noop

from pipeline.run import cluster, dispatcher
from pipeline.run.job import prepare_job

NODE = "simulated"


class Method:
    """An actor's method: `remote` runs it on the actor's own threads."""

    def __init__(self, threads: ThreadPoolExecutor, function: Any, call_s: float) -> None:
        self._threads, self._function, self._call_s = threads, function, call_s

    def remote(self, *arguments: Any) -> "Future[Any]":
        return self._threads.submit(self._run, *arguments)

    def _run(self, *arguments: Any) -> Any:
        time.sleep(self._call_s)
        return self._function(*arguments)


class Actor:
    def __init__(self, instance: Any, concurrency: int, call_s: float) -> None:
        self._instance, self._call_s = instance, call_s
        self._threads = ThreadPoolExecutor(concurrency)

    def __getattr__(self, name: str) -> Method:
        function = (lambda: NODE) if name == "node_id" else getattr(self._instance, name)
        return Method(self._threads, function, self._call_s)


class SimulatedRay:
    """As much of Ray as the driver calls."""

    def __init__(self, workers: int, call_s: float) -> None:
        self._workers, self._call_s = workers, call_s
        self.util = SimpleNamespace()

    def nodes(self) -> list[dict[str, Any]]:
        resources = {"CPU": float(self._workers)}
        place = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": 1}
        return [{"NodeID": NODE, "Alive": True, "Resources": resources, **place}]

    def remote(self, kind: type) -> Any:
        def options(max_concurrency: int, **_options: Any) -> Any:
            def build(*arguments: Any, **settings: Any) -> Actor:
                return Actor(kind(*arguments, **settings), max_concurrency, self._call_s)

            return SimpleNamespace(remote=build)

        return SimpleNamespace(options=options)

    def wait(self, calls: Sequence["Future[Any]"], num_returns: int, timeout: float) -> Any:
        done = wait(calls, timeout, FIRST_COMPLETED).done
        ready = [call for call in calls if call in done][:num_returns]
        return ready, []

    def get(self, call: "Future[Any]", timeout: float | None = None) -> Any:
        return call.result(timeout)

    def kill(self, actor: Actor) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--shard-s", type=float, default=1.0)
    parser.add_argument("--shards", type=int, default=3200)
    parser.add_argument("--call-s", type=float, default=0.002)
    arguments = parser.parse_args()
    os.environ[SHARD_SECONDS] = str(arguments.shard_s)
    dispatcher.ray = cluster.ray = SimulatedRay(arguments.workers, arguments.call_s)
    cluster.ray_session = nullcontext
    observer = Observer(arguments.shards)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_shards(folder, arguments.shards)
        job = prepare_job(job_config(folder, arguments.workers))
        result = dispatcher.run_job(job, observer, noop)
        assert result.state.shards_done == arguments.shards, result
    assert observer.first is not None
    first, last = observer.first, observer.last
    elapsed_s = last[1] - first[1] + arguments.shard_s
    print(
        json.dumps(
            {
                "benchmark": "driver_simulated_workers",
                **environment(),
                "settings": vars(arguments),
                "elapsed_s": round(elapsed_s, 2),
                "efficiency": round(arguments.shards * arguments.shard_s / arguments.workers / elapsed_s, 4),
                "driver_busy_share": round((last[2] - first[2]) / elapsed_s, 4),
            }
        )
    )
    os._exit(0)  # the simulated workers' threads wait for shards for ever


if __name__ == "__main__":
    main()
