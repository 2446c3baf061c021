"""SIGTERM ends a command as Ctrl-C does: with what is open closed, and with an exit code of its own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

EXIT_CODE = 128 + signal.SIGTERM


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within it, SIGTERM raises SystemExit with 128 + its number; the earlier handler comes back after it."""
    received: list[int] = []

    def end(signal_number: int, _frame: FrameType | None) -> NoReturn:
        received.append(signal_number)
        raise SystemExit(EXIT_CODE)

    earlier_handler = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except SystemExit as ending:
        # Where the signal came while ray waits, ray raises a SystemExit of its own instead.
        if received:
            raise SystemExit(EXIT_CODE) from ending
        raise
    finally:
        signal.signal(signal.SIGTERM, earlier_handler)
