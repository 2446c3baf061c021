"""How many images of a shape share a batch, as far as the device's memory has shown."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

# Full batches at a lowered limit after which a larger one is tried; twice as many after each failure.
BATCHES_UNTIL_RETRY = 64


@dataclass
class _Limit:
    images: int
    most_fitted: int = 0
    batches_since_change: int = 0
    batches_until_retry: int = BATCHES_UNTIL_RETRY


class BatchLimits:
    """Keeps the most images of each shape in one batch; not thread-safe.

    A limit is halved where a batch does not fit. Since memory may have been short for a while only, for
    another process or because free memory was in pieces, the limit doubles again after many full batches, and
    after twice as many each time that this fails.

    Args:
        batch_size: limit of a shape of which no batch has failed.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._limits: dict[Hashable, _Limit] = {}

    def of(self, shape: Hashable) -> int:
        """Return the most images of a shape in one batch, at least 1."""
        known = self._limits.get(shape)
        return self.batch_size if known is None else min(known.images, self.batch_size)

    def has_fitted(self, shape: Hashable, images: int) -> bool:
        """Return whether a batch of so many images, or more, has fitted."""
        known = self._limits.get(shape)
        return known is not None and images <= known.most_fitted

    def fitted(self, shape: Hashable, images: int) -> None:
        """Note that a batch fitted."""
        limit = self._limits.setdefault(shape, _Limit(self.batch_size))
        limit.most_fitted = max(limit.most_fitted, images)
        if limit.images >= self.batch_size or images < limit.images:
            return
        limit.batches_since_change += 1
        if limit.batches_since_change >= limit.batches_until_retry:
            limit.images, limit.batches_since_change = 2 * limit.images, 0

    def failed(self, shape: Hashable, images: int) -> None:
        """Note that a batch of more than one image did not fit, and halve what is allowed."""
        limit = self._limits.setdefault(shape, _Limit(self.batch_size))
        was_lowered_before = limit.images < self.batch_size or limit.batches_until_retry > BATCHES_UNTIL_RETRY
        if was_lowered_before and images > limit.images // 2:
            limit.batches_until_retry *= 2
        limit.images, limit.batches_since_change = max(1, images // 2), 0
        limit.most_fitted = min(limit.most_fitted, images - 1)
