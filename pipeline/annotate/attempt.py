"""Attempts at shards: how much of each is finished, and whether it may still be published."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Protocol, TypeVar

from pipeline.annotate.rows import SampleRows
from pipeline.errors import ShardAbandoned
from pipeline.output.counts import ShardCounts
from pipeline.shards.sample_error import SampleError
from pipeline.storage import ShardSource

Item = TypeVar("Item")


class ReadBytes(Protocol):
    """Counts the bytes of a shard that were read."""

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""

    def digest(self) -> str:
        """Return the digest of the bytes of the shard."""


class _State(Enum):
    OPEN = "may be published or abandoned"
    PUBLISHING = "publishing has begun"
    ABANDONED = "will not be published"


class Attempt:
    """One call that annotates a shard; other threads ask for its progress, and may abandon it.

    Args:
        shard: the shard.
        counts: returns the outcomes of its samples so far.
    """

    def __init__(self, shard: ShardSource, counts: Callable[[], ShardCounts]) -> None:
        self.counts = counts
        self._shard = shard
        self._lock = threading.Lock()
        self._state = _State.OPEN
        self._stream: ReadBytes | None = None
        self._samples_read = 0

    @property
    def shard_id(self) -> str:
        """Id of the shard."""
        return self._shard.shard_id

    @property
    def is_abandoned(self) -> bool:
        """Whether the shard will certainly not be published."""
        return self._state is _State.ABANDONED

    def error(self) -> ShardAbandoned:
        """Return the exception by which an abandoned attempt ends."""
        return ShardAbandoned(f"{self._shard.canonical_url}: abandoned before it was published")

    def counted(self, samples: Iterable[Item], stream: ReadBytes) -> Iterator[Item]:
        """Yield the samples of the shard, and count them.

        Args:
            samples: as they are read from the stream.
            stream: counts the bytes of the shard.

        Raises:
            ShardAbandoned: the attempt was abandoned.
        """
        self._stream = stream
        if self.is_abandoned:
            raise self.error()
        for sample in samples:
            self._samples_read += _is_sample(sample)
            yield sample

    def content_digest(self) -> str:
        """Return the digest of the bytes read; empty before the shard is opened."""
        return "" if self._stream is None else self._stream.digest()

    def done_share(self) -> float:
        """Return an estimate of how much of the shard is finished, in [0, 1].

        It is the share of the shard's bytes that was read, times the share of the samples read that have
        their outcome; 0 while no sample was read, and where the size of the shard is unknown.
        """
        if self._stream is None or not self._shard.size_bytes or not self._samples_read:
            return 0.0
        read_share = self._stream.bytes_read / self._shard.size_bytes
        finished_share = self.counts().samples_in / self._samples_read
        return max(0.0, min(1.0, read_share * finished_share))

    def begin_publishing(self) -> None:
        """Decide that the shard is published; from now on it cannot be abandoned.

        Raises:
            ShardAbandoned: the attempt was abandoned before.
        """
        with self._lock:
            if self.is_abandoned:
                raise self.error()
            self._state = _State.PUBLISHING

    def abandon(self) -> bool:
        """Decide that the shard is not published; return False where publishing has begun."""
        with self._lock:
            if self._state is _State.OPEN:
                self._state = _State.ABANDONED
            return self.is_abandoned


def _is_sample(item: object) -> bool:
    if isinstance(item, SampleRows):
        return item.is_sample
    return not isinstance(item, SampleError) or item.sample_index is not None


class AttemptsInFlight:
    """The attempts of an annotator that have not ended.

    Args:
        when_abandoned: called with each attempt that was abandoned, by the thread that abandons it.
    """

    def __init__(self, when_abandoned: Callable[[Attempt], None] = lambda _: None) -> None:
        self._when_abandoned = when_abandoned
        self._attempts: set[Attempt] = set()

    def __iter__(self) -> Iterator[Attempt]:
        """Return those that may still be published."""
        return iter([attempt for attempt in tuple(self._attempts) if not attempt.is_abandoned])

    def __len__(self) -> int:
        """Return how many have not ended, whether abandoned or not."""
        return len(self._attempts)

    @contextmanager
    def begun(self, shard: ShardSource, counts: Callable[[], ShardCounts]) -> Iterator[Attempt]:
        """Hold an attempt during the block; once abandoned, whatever error ends the block counts as that."""
        attempt = Attempt(shard, counts)
        self._attempts.add(attempt)
        try:
            yield attempt
        except Exception as error:
            if attempt.is_abandoned and not isinstance(error, ShardAbandoned):
                raise attempt.error() from error
            raise
        finally:
            self._attempts.discard(attempt)

    def abandon(self, shard_id: str) -> bool:
        """Abandon the attempts at a shard; return whether there was one, and none is being published."""
        attempts = [attempt for attempt in tuple(self._attempts) if attempt.shard_id == shard_id]
        abandoned = [attempt for attempt in attempts if attempt.abandon()]
        for attempt in abandoned:
            self._when_abandoned(attempt)
        return bool(attempts) and len(abandoned) == len(attempts)
