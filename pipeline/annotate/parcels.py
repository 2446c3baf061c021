"""Send objects between processes of one machine: what is large travels in an anonymous shared file.

Each end writes into one file of its own, again and again, since fresh memory costs more than the copy. What
arrives is therefore valid until the next answer is sent; an end that keeps it longer copies it. The files
have no name and are not in /dev/shm, which containers limit to 64 MB; they end with their last process.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, SupportsIndex

# up to so many bytes, a copy through the connection costs less than the file
INLINE_BYTES = 2**12
_SMALLEST_FILE_BYTES = 2**20
# vector instructions want it
_ALIGNMENT = 64


class Large:
    """Bytes that are sent like an array, without further copies; they arrive as bytes."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[type[bytes], tuple[pickle.PickleBuffer]]:
        return bytes, (pickle.PickleBuffer(self._content),)


class Parcels:
    """One end of a connection between two processes that ask and answer in turn.

    Args:
        connection: to the other end.
        keeps: whether arrays that arrive are copied, so that they stay valid.
    """

    def __init__(self, connection: Connection, *, keeps: bool = False) -> None:
        self._connection = connection
        self._keeps = keeps
        self._outgoing = memoryview(b"")
        self._incoming = memoryview(b"")

    def send(self, content: Any) -> None:
        """Send an object that can be pickled; arrays and what is `Large` are copied once.

        Raises:
            OSError: the other process has gone.
        """
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        sizes = [view.nbytes for view in views]
        if sum(sizes) <= INLINE_BYTES:
            self._connection.send_bytes(pickle.dumps((pickled, [bytes(view) for view in views], None, 0)))
            return
        new_file = self._with_room_for(_length(sizes))
        try:
            for start, size, view in zip(_starts(sizes), sizes, views, strict=True):
                self._outgoing[start : start + size] = view
            file_bytes = len(self._outgoing) if new_file is not None else 0
            self._connection.send_bytes(pickle.dumps((pickled, None, sizes, file_bytes)))
            if new_file is not None:
                reduction.send_handle(self._connection, new_file, None)
        finally:
            if new_file is not None:
                os.close(new_file)

    def receive(self) -> Any:
        """Wait for the next object; arrays in it are writable.

        Raises:
            EOFError, OSError: the other process has gone.
        """
        # from a process that this one started, or that started this one
        pickled, inline, sizes, file_bytes = pickle.loads(self._connection.recv_bytes())  # noqa: S301
        if sizes is None:
            return pickle.loads(pickled, buffers=map(bytearray, inline))  # noqa: S301
        if file_bytes:
            new_file = reduction.recv_handle(self._connection)
            try:
                self._incoming = _mapped(new_file, file_bytes)
            finally:
                os.close(new_file)
        whole = self._incoming[: _length(sizes)]
        if self._keeps:
            whole = memoryview(bytearray(whole))
        parts = [whole[start : start + size] for start, size in zip(_starts(sizes), sizes, strict=True)]
        return pickle.loads(pickled, buffers=parts)  # noqa: S301

    def close(self) -> None:
        """Close this end."""
        self._connection.close()

    def _with_room_for(self, size_bytes: int) -> int | None:
        """Return the descriptor of a new file where the present one is too small."""
        if size_bytes <= len(self._outgoing):
            return None
        file_bytes = max(size_bytes, 2 * len(self._outgoing), _SMALLEST_FILE_BYTES)
        new_file = _anonymous_file()
        try:
            os.ftruncate(new_file, file_bytes)
            self._outgoing = _mapped(new_file, file_bytes)
        except BaseException:
            os.close(new_file)
            raise
        return new_file


def _mapped(file: int, size_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(file, size_bytes))


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("samples")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(_aligned(size) for size in sizes)][:-1]


def _length(sizes: Sequence[int]) -> int:
    return sum(map(_aligned, sizes))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
