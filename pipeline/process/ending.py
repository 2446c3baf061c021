"""The end of a process, before native libraries can spoil its exit code."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress


def skip_native_exit() -> Callable[[int], None]:
    """Let this process end right after the last of Python's exit handlers, with a code told later.

    Threads of ray's gRPC outlive `ray.shutdown()` and race with the C++ destructors that run after Python has
    ended: once in a while a process whose work is done then dies of a segmentation fault. Ray leaves its own
    workers the same way.

    Call it before ray, pyarrow and torch are imported: handlers run in reverse order, so theirs come first.

    Returns:
        A function that takes the exit code; where it is never called, the process ends as usual.
    """
    codes: list[int] = []

    def leave() -> None:
        if codes:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                # a reader that has gone is no reason for another exit code
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(codes[-1])

    atexit.register(leave)
    return codes.append
