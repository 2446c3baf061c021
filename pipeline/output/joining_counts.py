"""What became of the samples that a dataset met, counted across the processes of its workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from pipeline.errors import UserError

MAX_WORKERS = 1024


@dataclass(frozen=True)
class JoinCounts:
    """What became of the samples of an epoch on one rank; all but the last two are outcomes of a sample.

    Attributes:
        joined: handed out.
        without_rows: in the shard, but without annotation rows: failed, or no prompt applied.
        without_mask: all their prompts were rejected or won no pixel, or none has a class where classes are
            asked for.
        damaged: unreadable in the shard.
        mispaired: the rows at their ordinal have another key, or were made of an image of another size.
        undecodable: image, mask or label map cannot be decoded.
        rows_without_sample: rows whose ordinal the shard does not have.
        shards_left_out: shards whose two files are of different attempts, or which could not be read.
    """

    joined: int = 0
    without_rows: int = 0
    without_mask: int = 0
    damaged: int = 0
    mispaired: int = 0
    undecodable: int = 0
    rows_without_sample: int = 0
    shards_left_out: int = 0

    @property
    def samples(self) -> int:
        """Samples that were met."""
        outcomes = (self.joined, self.without_rows, self.without_mask, self.damaged)
        return sum(outcomes) + self.mispaired + self.undecodable


KINDS = tuple(field.name for field in fields(JoinCounts))


class SharedCounts:
    """Counters in shared memory; every worker has a row of its own, so that none waits for another."""

    def __init__(self) -> None:
        self._table = torch.zeros(MAX_WORKERS, len(KINDS), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def of_worker(self, worker: int) -> WorkerCounts:
        """A worker's own counters, begun at zero."""
        if worker >= MAX_WORKERS:
            raise UserError(f"num_workers: expected at most {MAX_WORKERS}, got more")
        return WorkerCounts(self._table[worker].zero_())

    def read(self) -> JoinCounts:
        """The sum over the workers."""
        return JoinCounts(**dict(zip(KINDS, self._table.sum(dim=0).tolist(), strict=True)))


class WorkerCounts:
    """The counters of one worker."""

    _columns: Mapping[str, int] = {kind: column for column, kind in enumerate(KINDS)}

    def __init__(self, row: torch.Tensor) -> None:
        self._row = row

    def add(self, kind: str, count: int = 1) -> None:
        """Count one of JoinCounts' kinds."""
        self._row[self._columns[kind]] += count
