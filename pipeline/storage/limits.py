"""Limits on how long a reader waits for bytes, and the measure of the rate at which they arrive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

MIN_READ_BYTES_PER_S = 1024.0
SHORTEST_WAIT_S = 0.001

Result = TypeVar("Result")


@dataclass(frozen=True)
class ReadLimits:
    """How long a reader waits. Only time spent in waiting for bytes counts, not that between two reads.

    Attributes:
        min_bytes_per_s: smallest rate at which bytes must arrive; None or 0: no limit.
        window_s: seconds of waiting over which the rate is measured, and after which a server is silent.
        answer_timeout_s: seconds in which one request must be answered, up to the last line of its headers.
        total_s: seconds after which a request that fails is not repeated.
    """

    min_bytes_per_s: float | None = MIN_READ_BYTES_PER_S
    window_s: float = 60.0
    answer_timeout_s: float = 30.0
    total_s: float = 90.0


class TooSlowError(OSError):
    """Bytes arrive at less than the smallest rate allowed."""


class RateMeter:
    """Measures the rate at which bytes arrive in each window of waiting.

    Args:
        limits: the smallest rate and the window.
    """

    def __init__(self, limits: ReadLimits) -> None:
        self._limits = limits
        self._waited_s = 0.0
        self._received_bytes = 0

    @property
    def window_bytes(self) -> int:
        """The smallest number of bytes that must arrive in a window."""
        return ceil((self._limits.min_bytes_per_s or 0) * self._limits.window_s)

    @property
    def missing_bytes(self) -> int:
        """The number of bytes that must still arrive in this window."""
        return max(0, self.window_bytes - self._received_bytes)

    @property
    def patience_s(self) -> float:
        """The number of seconds after which waiting for the next byte is too long."""
        left_s = self._limits.window_s - self._waited_s
        return max(SHORTEST_WAIT_S, left_s if self.missing_bytes else left_s + self._limits.window_s)

    def add(self, waited_s: float, received_bytes: int) -> None:
        """Count bytes that have arrived after a wait.

        Raises:
            TooSlowError: a window has ended with too few of them.
        """
        self._waited_s += waited_s
        self._received_bytes += received_bytes
        if self._waited_s >= self._limits.window_s:
            if self.missing_bytes:
                raise self.too_slow()
            self._waited_s, self._received_bytes = 0.0, 0

    def too_slow(self) -> TooSlowError:
        """Return the error for a reader that has waited as long as `patience_s` allowed."""
        if not self._limits.min_bytes_per_s:
            return TooSlowError(f"no byte arrived for {self._limits.window_s:g} s")
        received_bytes = self._received_bytes if self.missing_bytes else 0
        return TooSlowError(
            f"received {received_bytes:,} bytes in {self._limits.window_s:g} s of waiting; the limit is "
            f"{self._limits.min_bytes_per_s:,g} bytes per second (run.min_read_bytes_per_s)"
        )


def within(timeout_s: float, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function, and wait for a limited time.

    A call that has not returned by then goes on in its thread, and its result is dropped: nothing ends a call
    that hangs in the kernel or in a library.

    Raises:
        TimeoutError: the function has not returned in time.
    """
    outcome: list[Result] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            outcome.append(function(*arguments))
        except BaseException as error:
            failures.append(error)

    # a daemon, so that a process can end although the call hangs
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failures:
        raise failures[0]
    if not outcome:
        raise TimeoutError(f"no answer for {timeout_s:g} s")
    return outcome[0]


class WatchedFile:
    """Reads a local file or an object of a store, whose reads cannot be watched while they last.

    A block that does not arrive in time is read again in a smaller size, whose rate is known when it has not
    arrived in time either.

    Args:
        opened: returns a new stream from a position on.
        limits: the smallest rate allowed.
        block_bytes: size of the largest read.

    Raises:
        OSError: the file cannot be opened (TimeoutError: in time).
    """

    def __init__(self, opened: Callable[[int], Any], limits: ReadLimits, block_bytes: int) -> None:
        self._opened = opened
        self._limits = limits
        self._most_bytes = block_bytes
        self._block_bytes = block_bytes
        self._offset = 0
        self._meter = RateMeter(limits)
        self._stream = within(limits.total_s, opened, 0)

    def read(self, size_bytes: int) -> bytes:
        """Return the next bytes, at most so many; none at the end.

        Raises:
            OSError: the read failed (TooSlowError: or is too slow).
        """
        if not self._limits.min_bytes_per_s:
            return self._counted(self._stream.read(size_bytes))
        try:
            return self._read_block(min(size_bytes, self._block_bytes))
        except TimeoutError:
            # smaller blocks, so that the rate is known when one of them does not arrive in time
            self._meter = RateMeter(self._limits)
            self._block_bytes = self._meter.window_bytes
            self._stream = within(self._limits.total_s, self._opened, self._offset)
            return self._read_block(min(size_bytes, self._block_bytes))

    def _read_block(self, size_bytes: int) -> bytes:
        started_s, patience_s = time.monotonic(), self._meter.patience_s
        # a block that would fill the window shows, by not arriving, that the rate is too low
        is_conclusive = size_bytes <= (self._meter.missing_bytes or self._meter.window_bytes)
        try:
            data = within(patience_s, self._stream.read, size_bytes)
        except TimeoutError:
            if is_conclusive:
                raise self._meter.too_slow() from None
            raise
        waited_s = time.monotonic() - started_s
        self._meter.add(waited_s, len(data))
        if waited_s < patience_s / 8:
            self._block_bytes = min(2 * self._block_bytes, self._most_bytes)
        return self._counted(data)

    def _counted(self, data: bytes) -> bytes:
        self._offset += len(data)
        return data

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()
