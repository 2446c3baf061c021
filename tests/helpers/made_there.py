"""Contents of tasks that do something only in the process that works on them."""

import gc
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.annotate.sample_work import SampleWork
from pipeline.shards.sample_error import SampleError


@dataclass(frozen=True)
class MadeThere:
    """Items of which the only one is made when they are iterated over."""

    make: Callable[..., Any]
    arguments: tuple[Any, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        """Make the item."""
        return iter([self.make(*self.arguments)])


class TwoWordError(Exception):
    """Cannot be unpickled: it is not made of what it holds."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class LockedError(Exception):
    """Cannot be pickled, and has no words."""

    def __init__(self) -> None:
        super().__init__(threading.Lock())

    def __str__(self) -> str:
        raise ValueError


def raise_two_words() -> None:
    """Raise what cannot be unpickled."""
    raise TwoWordError("no", "masks")


def raise_locked() -> None:
    """Raise what cannot be pickled."""
    raise LockedError


def locked_item() -> SampleError:
    """Return an item whose outcome cannot be pickled."""
    return SampleError("read", "cut", threading.Lock())  # type: ignore[arg-type]


def process_id() -> SampleError:
    """Return an item that names this process."""
    return SampleError("read", "cut", str(os.getpid()))


def dawdle(started: Path, seconds: float) -> SampleError:
    """Leave a file, then take so long."""
    started.touch()
    time.sleep(seconds)
    return process_id()


def process_id_in_room(size_bytes: int) -> SampleError:
    """Hold memory of the gate, then return an item that names this process."""
    (work,) = (each for each in gc.get_objects() if isinstance(each, SampleWork))
    with work._room(size_bytes):
        return process_id()


def exhaust_address_space() -> None:
    """Let this process have hardly more address space than it has, and ask for more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**24
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    np.ones(2**28, np.uint8)
