"""Counts of joined samples that are shared by the processes of a DataLoader's workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch

from pipeline.errors import UserError
from pipeline.output.joining import JoinCounts

MAX_WORKERS = 1024
OUTCOMES = tuple(field.name for field in fields(JoinCounts))


class SharedCounts:
    """Counters in shared memory; every worker has its own row, so that none waits for another."""

    def __init__(self) -> None:
        self._table = torch.zeros(MAX_WORKERS, len(OUTCOMES), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def of_worker(self, worker: int) -> WorkerCounts:
        """Return a worker's own counters, reset to zero."""
        if worker >= MAX_WORKERS:
            raise UserError(f"num_workers: expected at most {MAX_WORKERS}, got more")
        return WorkerCounts(self._table[worker].zero_())

    def read(self) -> JoinCounts:
        """Return the sum over the workers."""
        return JoinCounts(**dict(zip(OUTCOMES, self._table.sum(dim=0).tolist(), strict=True)))


class WorkerCounts:
    """The counters of one worker."""

    _columns: Mapping[str, int] = {outcome: column for column, outcome in enumerate(OUTCOMES)}

    def __init__(self, row: torch.Tensor) -> None:
        self._row = row

    def add(self, outcome: str, count: int = 1) -> None:
        """Add to the count of one of JoinCounts' fields."""
        self._row[self._columns[outcome]] += count
