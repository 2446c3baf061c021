"""Decide how much a worker is given at a time: enough to keep it busy, and nothing that would end last."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What a worker still has to do.

    Attributes:
        bytes_left: bytes of the shards in flight on it that are not finished.
        bytes_per_s: its speed; None before it is known.
    """

    bytes_left: float
    bytes_per_s: float | None = None


class Balance:
    """How the rest of a job would be divided among its workers at best.

    Workers take the largest shards first. With a further shard, a worker must not end after the time at which
    all workers would end if the rest of the job could be divided among them at will. So the worker with a
    very large shard keeps to it, and the last shards go to those that are done first.

    Args:
        loads: of all workers that compute, or soon will.
        bytes_in_queue: of the shards that no worker has.
    """

    def __init__(self, loads: Iterable[Load], bytes_in_queue: float) -> None:
        loads = list(loads)
        known = [load.bytes_per_s for load in loads if load.bytes_per_s]
        self._usual_bytes_per_s = sum(known) / len(known) if known else 1.0
        bytes_per_s = sum(load.bytes_per_s or self._usual_bytes_per_s for load in loads)
        bytes_left = bytes_in_queue + sum(load.bytes_left for load in loads)
        self._time_left_s = bytes_left / bytes_per_s if loads else 0.0

    def most_further_bytes(self, load: Load) -> float:
        """Return the largest shard that a worker with a load may begin beside it; below 0: none."""
        return self._time_left_s * (load.bytes_per_s or self._usual_bytes_per_s) - load.bytes_left
