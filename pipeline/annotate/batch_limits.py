"""How many images of a shape share a batch, as far as the device's memory has shown."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

# Full batches at a lowered limit after which a larger one is tried; twice as many after each failure.
BATCHES_UNTIL_RETRY = 64


@dataclass
class _Limit:
    images: int
    batches_until_retry: int
    most_fitted: int = 0
    full_batches: int = 0
    is_retry: bool = False


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
        limit = self._known(shape)
        limit.most_fitted = max(limit.most_fitted, images)
        if images < limit.images or limit.images >= self.batch_size:
            return
        limit.is_retry = False
        limit.full_batches += 1
        if limit.full_batches >= limit.batches_until_retry:
            limit.images, limit.full_batches, limit.is_retry = 2 * limit.images, 0, True

    def failed(self, shape: Hashable, images: int) -> None:
        """Note that a batch of more than one image did not fit, and allow half of that."""
        limit = self._known(shape)
        if limit.is_retry:
            limit.batches_until_retry *= 2
        limit.images, limit.full_batches, limit.is_retry = max(1, images // 2), 0, False
        limit.most_fitted = min(limit.most_fitted, images - 1)

    def _known(self, shape: Hashable) -> _Limit:
        return self._limits.setdefault(shape, _Limit(self.batch_size, BATCHES_UNTIL_RETRY))
