"""Read the first samples of a shard, and no more bytes than a look needs."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from itertools import islice
from typing import BinaryIO, cast

from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample, read_samples

# of a shard, however large its samples are
MOST_BYTES = 64 << 20


class BoundedStream(io.RawIOBase):
    """A stream that ends after MOST_BYTES, and counts the bytes that were read.

    Args:
        stream: what is read.

    Attributes:
        bytes_read: bytes read so far.
        is_cut: whether the limit was met, so that the end is not that of the stream.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.bytes_read = 0
        self.is_cut = False

    def readable(self) -> bool:
        """Return true."""
        return True

    def read(self, size_bytes: int = -1) -> bytes:
        """Return the next bytes, at most so many; none at the end and beyond the limit."""
        if self.bytes_read >= MOST_BYTES:
            self.is_cut = True
            return b""
        data = self._stream.read(size_bytes)
        self.bytes_read += len(data)
        return data


def first_items(
    stream: BoundedStream, *, max_member_bytes: int, most: int, wanted_fields: Collection[str] | None = None
) -> Iterator[RawSample | SampleError]:
    """Read the first samples and errors of a shard, as far as the stream goes.

    Args:
        stream: the shard.
        max_member_bytes: a sample with a larger wanted member fails.
        most: largest number of samples and errors.
        wanted_fields: which fields to keep; None keeps all.

    Raises:
        OSError, ShardError: whatever the stream raises itself.
    """
    items = read_samples(
        cast("BinaryIO", stream), max_member_bytes=max_member_bytes, wanted_fields=wanted_fields
    )
    for item in islice(items, most):
        is_about_the_start = isinstance(item, SampleError) and item.stage == "open"
        # what the limit cuts is not damaged
        if stream.is_cut and not is_about_the_start:
            return
        yield item
