"""Decompress gzip and zstd shards while they are read; the format is recognised by its first bytes."""

from __future__ import annotations

import pyarrow as pa

from pipeline.shards.tar import BLOCK_BYTES, ByteSource, DamageError

# images barely shrink, and captions by a factor of ten at most; gzip can reach 1,000, zstd far more
MAX_EXPANSION = 100
# small shards of captions alone, or of synthetic images, may expand by more
MIN_LIMIT_BYTES = 64 << 20

_LONGEST_MAGIC_BYTES = 4
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# the first byte of a frame that decoders skip, with which pzstd begins, is one of sixteen
_ZSTD_SKIPPABLE, _ZSTD_SKIPPABLE_STARTS = b"\x2a\x4d\x18", range(0x50, 0x60)


def decompressed(stream: ByteSource) -> ByteSource:
    """Return the content of a stream: what gzip or zstd compressed, or the bytes as they are.

    Args:
        stream: read forward only; its first bytes are read here.

    Returns:
        A stream whose `read` raises DamageError where the compressed data are cut (`truncated`), damaged
        (`corrupt_compression`) or expand to more than MAX_EXPANSION times their size
        (`expands_too_much`); errors of the source itself pass through.
    """
    head = b""
    while len(head) < _LONGEST_MAGIC_BYTES and (piece := stream.read(BLOCK_BYTES - len(head))):
        head += piece
    source = _Source(head, stream)
    compression = _compression_of(head)
    return source if compression is None else _Decompressed(source, compression)


def _compression_of(head: bytes) -> str | None:
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    is_skippable = head[1:4] == _ZSTD_SKIPPABLE and head[0] in _ZSTD_SKIPPABLE_STARTS
    return "zstd" if head.startswith(_ZSTD_MAGIC) or is_skippable else None


class _Source:
    """A stream whose first bytes were read already.

    Attributes:
        closed: that it is open, for pyarrow.
        bytes_read: bytes that were passed on.
        failure: what the stream raised.
    """

    closed = False

    def __init__(self, head: bytes, stream: ByteSource) -> None:
        self.bytes_read = 0
        self.failure: BaseException | None = None
        self._head = head
        self._stream = stream

    def read(self, size_bytes: int = -1, /) -> bytes:
        """Return the next bytes, at most so many; none at the end."""
        if self._head:
            end = len(self._head) if size_bytes < 0 else size_bytes
            data, self._head = self._head[:end], self._head[end:]
        else:
            try:
                data = self._stream.read(size_bytes)
            except BaseException as error:
                self.failure = error
                raise
        self.bytes_read += len(data)
        return data

    def close(self) -> None:
        """Leave the stream open: it belongs to the caller."""


class _Decompressed:
    """The content of a compressed stream, which may have several parts, one after another."""

    def __init__(self, source: _Source, compression: str) -> None:
        self._source = source
        self._compression = compression
        self._stream = pa.CompressedInputStream(pa.PythonFile(source, mode="r"), compression)
        self._bytes_read = 0

    def read(self, size_bytes: int = -1, /) -> bytes:
        """Return the next bytes of the content, at most so many; none at the end."""
        try:
            data: bytes = self._stream.read(size_bytes)
        except OSError as error:
            if self._source.failure is not None:
                raise
            raise self._damage(error) from error
        self._bytes_read += len(data)
        if self._bytes_read > max(MIN_LIMIT_BYTES, MAX_EXPANSION * self._source.bytes_read):
            message = (
                f"{self._source.bytes_read} bytes of {self._compression} data expand to {self._bytes_read} "
                f"bytes and more; the limit is {MAX_EXPANSION} times their size; the rest is not read"
            )
            raise DamageError("expands_too_much", message)
        return data

    def _damage(self, error: OSError) -> DamageError:
        compressed_bytes = self._source.bytes_read
        # pyarrow has one type of error for both
        if "truncated" in str(error).lower():
            message = f"the {self._compression} data end too early, at byte {compressed_bytes} of the file"
            return DamageError("truncated", message)
        # the decoder's own limit of 128 MiB
        if "too much memory" in str(error):
            message = "decompressing it takes more than 128 MiB; compress it without zstd's --long=28 or more"
            return DamageError("compressed", message, stage="open")
        message = (
            f"the {self._compression} data are damaged, or other data follow them, before byte "
            f"{compressed_bytes} of the file ({error}); the rest is not read"
        )
        return DamageError("corrupt_compression", message)
