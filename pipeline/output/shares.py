"""Who reads what in an epoch: every sample once over all ranks and their workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Shard = TypeVar("Shard")


@dataclass(frozen=True)
class Share(Generic[Shard]):
    """A shard of which every `parts`-th sample, from ordinal `part` on, is read."""

    shard: Shard
    part: int = 0
    parts: int = 1

    def has(self, sample_index: int) -> bool:
        """Whether the sample belongs to this share."""
        return sample_index % self.parts == self.part


def shares_of(
    shards: Sequence[Shard], reader: int, readers: int, *, epoch: int, seed: int, shuffle: bool
) -> list[Share[Shard]]:
    """What one of several readers reads in an epoch.

    Whole shards are dealt out, as many to every reader; the readers divide the samples of those left over.
    So all have work where there are fewer shards than readers, and none has much more than another.

    Args:
        shards: all of them, in the same order for every reader.
        reader: from 0.
        readers: workers of all ranks together.
        epoch: with the seed decides the order of the shards.
        seed: the same for every reader.
        shuffle: whether the shards are shuffled.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(shards)) if shuffle else range(len(shards))
    dealt = len(shards) - len(shards) % readers
    whole = [Share(shards[index]) for index in order[reader:dealt:readers]]
    left_over = order[dealt:]
    if len(left_over) == 0:
        return whole
    # readers 0, n, 2n, ... divide the first of the n shards left over
    mine, part = reader % len(left_over), reader // len(left_over)
    parts = len(range(mine, readers, len(left_over)))
    return [*whole, Share(shards[left_over[mine]], part, parts)]
