"""Copies to a device that the CPU does not wait for, and a stream of work for each batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue

import numpy as np
import torch


def sent(arrays: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """Stack arrays of one shape and dtype in page-locked memory, and copy them to a device without waiting.

    The allocator of page-locked memory reuses it only once the copy has happened.
    """
    dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    shape = (len(arrays), *arrays[0].shape)
    staged = torch.empty(shape, dtype=dtype, pin_memory=device.type != "cpu")
    np.stack(arrays, out=staged.numpy())
    return staged.to(device, non_blocking=True)


class Streams:
    """Gives each batch on a CUDA device its own stream, so that batches overlap.

    Why no tensor needs `record_stream`:

    - The weights and whatever else was made before are complete when a stream is made, as it waits for the
      device.
    - What a step allocates, it uses on its own stream alone, and the allocator reuses memory on the stream
      that it was allocated on, in order.
    - What steps share besides (rows of the text cache) is read and written only inside `ordered`, in which
      the work of one step begins after that of the step before it: rows are complete when they are read, and
      have been read when they are overwritten. What a step gets from there is a copy on its own stream.
    - A step ends by waiting for its stream while everything that it used is still referenced: it brings its
      maps to the CPU last. After an error, `own_stream` waits. So nothing is released, and then reused by
      another stream, while a kernel may still read it.

    A stream is used again by later steps, as cuBLAS keeps its working memory for every stream.

    Args:
        device: on one that is not CUDA, nothing happens.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
        self._order = threading.Lock()
        self._shared_until: torch.cuda.Event | None = None

    @contextmanager
    def own_stream(self) -> Iterator[None]:
        """Run the kernels launched inside on a stream of their own, and wait for them at the end."""
        if self._device.type != "cuda":
            yield
            return
        try:
            stream = self._idle.get_nowait()
        except Empty:
            stream = self._new_stream()
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()
            self._idle.put(stream)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Let the work inside begin, on the device too, after that of the last step that was here."""
        with self._order:
            if self._device.type != "cuda":
                yield
                return
            stream = torch.cuda.current_stream(self._device)
            if self._shared_until is not None:
                stream.wait_event(self._shared_until)
            try:
                yield
            finally:
                self._shared_until = stream.record_event()

    def _new_stream(self) -> torch.cuda.Stream:
        torch.cuda.synchronize(self._device)
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
