"""Send objects between processes of one machine: what is large travels in anonymous shared files.

Each end reuses a few files, since fresh memory costs more than the copy. Received arrays are views of a file,
which is reused once the last of them is deleted. The files have no name and are not in /dev/shm, which
containers limit to 64 MB; the kernel frees them when the last process that has them open ends.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import struct
import tempfile
import weakref
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, SupportsIndex

import numpy as np

from pipeline.errors import ScratchError

# what `Parcels` raises where the other process has ended; any other OSError is a fault of this machine
ENDS_OF_CONNECTION = (EOFError, ConnectionError)
# below this size, a copy through the connection costs less than a file
INLINE_BYTES = 2**12
_SMALLEST_FILE_BYTES = 2**20
# vector instructions are faster on aligned memory
_ALIGNMENT = 64


class Large:
    """Bytes that are sent like an array, without further copies; they arrive as bytes."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[type[bytes], tuple[pickle.PickleBuffer]]:
        return bytes, (pickle.PickleBuffer(self._content),)


class Parcels:
    """One end of a connection between two processes; only one thread at a time may use it.

    Args:
        connection: to the other end.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outgoing: list[memoryview] = []
        self._free: set[int] = set()
        self._incoming: dict[int, mmap.mmap] = {}
        # numbers of the other end's files that no array here views any more
        self._returned: deque[int] = deque()

    def send(self, content: Any) -> None:
        """Send an object that can be pickled; arrays and what is `Large` are copied once.

        Raises:
            ConnectionError: the other process has ended.
            Exception: the object cannot be pickled; nothing was sent.
        """
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        sizes = [view.nbytes for view in views]
        returned = [self._returned.popleft() for _ in range(len(self._returned))]
        if sum(sizes) <= INLINE_BYTES:
            inline = [bytes(view) for view in views]
            self._connection.send_bytes(pickle.dumps((pickled, returned, inline, None)))
            return
        number, new_file = self._file_for(_length(sizes))
        try:
            memory = self._outgoing[number]
            for start, size, view in zip(_starts(sizes), sizes, views, strict=True):
                memory[start : start + size] = view
            place = (number, len(memory) if new_file is not None else 0)
            self._connection.send_bytes(pickle.dumps((pickled, returned, sizes, place)))
            if new_file is not None:
                reduction.send_handle(self._connection, new_file, None)
        finally:
            if new_file is not None:
                os.close(new_file)

    def receive(self) -> Any:
        """Wait for the next object; arrays in it are writable.

        Raises:
            EOFError, ConnectionError: the other process has ended.
            Exception: the object cannot be unpickled.
        """
        # the bytes are from a process that this one started, or that started this one
        pickled, returned, parts, place = pickle.loads(self._connection.recv_bytes())  # noqa: S301
        self._free.update(returned)
        if place is None:
            return pickle.loads(pickled, buffers=map(bytearray, parts))  # noqa: S301
        number, new_bytes = place
        if new_bytes:
            new_file = reduction.recv_handle(self._connection)
            try:
                self._incoming[number] = mmap.mmap(new_file, new_bytes)
            finally:
                os.close(new_file)
        whole = np.frombuffer(self._incoming[number], np.uint8, _length(parts))
        weakref.finalize(whole, self._returned.append, number)
        view = memoryview(whole)  # type: ignore[arg-type]
        del whole
        buffers = [view[start : start + size] for start, size in zip(_starts(parts), parts, strict=True)]
        del view
        return pickle.loads(pickled, buffers=buffers)  # noqa: S301

    def limit_waits(self, timeout_s: float | None) -> None:
        """Let calls of `send` and `receive` raise BlockingIOError where nothing moves for so long.

        That holds in the middle of a message too, such as one whose length was written by a broken process.

        Args:
            timeout_s: seconds; None: no limit.
        """
        seconds, fraction = divmod(timeout_s or 0.0, 1)
        timeval = struct.pack("ll", int(seconds), int(fraction * 1e6))
        with socket.socket(fileno=os.dup(self._connection.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
            same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def has_arrived(self) -> bool:
        """Return whether an object, or the end of the connection, can be received without waiting."""
        return self._connection.poll()

    def close(self) -> None:
        """Close this end; what has arrived stays valid."""
        self._connection.close()

    def _file_for(self, size_bytes: int) -> tuple[int, int | None]:
        """Return the number of a file that nobody reads, and its descriptor if it is new."""
        fitting = [number for number in self._free if len(self._outgoing[number]) >= size_bytes]
        if fitting:
            number = min(fitting, key=lambda each: len(self._outgoing[each]))
            self._free.discard(number)
            return number, None
        # a quarter more, since the next chunk may be a little larger
        new_file, memory = _mapped_file(max(size_bytes + size_bytes // 4, _SMALLEST_FILE_BYTES))
        if self._free:
            # replace one that is too small
            number = self._free.pop()
            self._outgoing[number] = memory
        else:
            number = len(self._outgoing)
            self._outgoing.append(memory)
        return number, new_file


def _mapped_file(size_bytes: int) -> tuple[int, memoryview]:
    """Return the descriptor of a new anonymous file, and its content as memory.

    Raises:
        ScratchError: this machine has no room for it.
    """
    try:
        new_file = _anonymous_file()
        try:
            os.ftruncate(new_file, size_bytes)
            return new_file, memoryview(mmap.mmap(new_file, size_bytes))
        except BaseException:
            os.close(new_file)
            raise
    except OSError as error:
        raise ScratchError(
            f"{size_bytes:,} bytes of memory for samples cannot be had on this machine: "
            f"{error.strerror or error}; free memory there, or lower run.lookahead_bytes"
        ) from error


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
