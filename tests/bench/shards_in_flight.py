"""Annotate shards as the driver does: the next one begins as soon as the worker has room for it."""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipeline.config.schema import RunConfig

Shard = TypeVar("Shard")
SHARDS_IN_FLIGHT: int = RunConfig().shards_in_flight


def work_through(
    shards: Iterable[Shard],
    annotate: Callable[[Shard], object],
    wait_for_room: Callable[[], None],
    shards_in_flight: int = SHARDS_IN_FLIGHT,
) -> float:
    """Annotate shards, several in flight; raises what an annotation raised.

    Returns:
        Seconds from the first to the last.
    """
    in_flight = threading.Semaphore(shards_in_flight)
    runs: list[Future[object]] = []
    started_s = time.perf_counter()
    with ThreadPoolExecutor(shards_in_flight) as pool:
        for shard in shards:
            in_flight.acquire()
            runs.append(pool.submit(annotate, shard))
            runs[-1].add_done_callback(lambda _: in_flight.release())
            wait_for_room()
    elapsed_s = time.perf_counter() - started_s
    for run in runs:
        run.result()
    return elapsed_s
