"""The code of sample processes, which decode images and make masks, and of the launcher that forks them.

The launcher imports the libraries once and forks a process on request: that takes a fraction of a second and
shares the imported code, whereas a new Python process would import for seconds.
"""

from __future__ import annotations

import gc
import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, reduction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from pipeline.annotate.class_prompts import without_classes
from pipeline.annotate.parcels import ENDS_OF_CONNECTION, Parcels
from pipeline.annotate.processes import (
    DONE,
    FAILED,
    FORK,
    KILL,
    MOST_OOM_SCORE,
    OOM_SCORE_FILE,
    PREPARE,
    READY,
    ROOM,
    ROOM_LEFT,
)
from pipeline.annotate.sample_work import SampleWork
from pipeline.annotate.stored_samples import StoredWork
from pipeline.annotate.work_in_threads import work_of

_JOIN_TIMEOUT_S = 10.0


def serve_launcher(descriptor: int) -> None:
    """Fork a process for each connection that arrives, until the process that started this one ends.

    Args:
        descriptor: of a socket on which requests arrive.
    """
    connection = Connection(descriptor)
    requests = Parcels(connection)
    # otherwise the garbage collector would touch, and so copy, the pages that children share
    gc.freeze()
    children: dict[int, BaseProcess] = {}
    try:
        requests.send(READY)
        while True:
            task, pid = requests.receive()
            if task == FORK:
                child = _forked(Connection(reduction.recv_handle(connection)), connection)
                children[child.pid or 0] = child
                requests.send(child.pid)
            else:
                timeout_s = 0.0 if task == KILL else _JOIN_TIMEOUT_S
                requests.send(_exit_code(children.pop(pid, None), timeout_s))
    except (EOFError, OSError):
        for child in children.values():
            child.kill()


def _forked(connection: Connection, requests: Connection) -> BaseProcess:
    with connection:
        child = get_context("fork").Process(target=_serve, args=(connection, requests))
        child.start()
    return child


def _exit_code(child: BaseProcess | None, timeout_s: float) -> int | None:
    """Return the exit code of a process; kill it if it has not ended in time."""
    if child is None:
        return None
    child.join(timeout_s)
    if child.exitcode is None:
        child.kill()
        child.join()
    return child.exitcode


def _serve(connection: Connection, requests: Connection) -> None:
    """Receive the settings, then work on samples until the other end is closed."""
    requests.close()
    with suppress(OSError):
        OOM_SCORE_FILE.write_text(str(MOST_OOM_SCORE))
    with suppress(*ENDS_OF_CONNECTION):
        parcels = Parcels(connection)
        work = work_of(parcels.receive(), _Rooms(parcels).room)
        parcels.send((READY, None))
        while True:
            # no reference to the task is kept, so that its memory can be used again
            _send_answer(parcels, _answer(work, *parcels.receive()))


def _send_answer(parcels: Parcels, answer: tuple[str, Any]) -> None:
    try:
        parcels.send(answer)
    except ENDS_OF_CONNECTION:
        raise
    except Exception as error:
        # a result that cannot be pickled is a bug, not the fault of a sample
        parcels.send(_failure(error))


def _answer(work: SampleWork | StoredWork, task: str, content: Any) -> tuple[str, Any]:
    try:
        if task == PREPARE:
            return DONE, without_classes(work.prepare(content))
        return DONE, work.finish(content)
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> tuple[str, Exception]:
    """Return the message that makes the caller raise an error, with the traceback of this process."""
    place = traceback.format_exc()
    words = traceback.format_exception_only(error)[0].strip()
    sent = error if _arrives(error) else RuntimeError(words)
    sent.add_note(f"in a sample process:\n{place}")
    return FAILED, sent


def _arrives(error: Exception) -> bool:
    """Return whether an error can be pickled and unpickled; not every exception can."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)  # noqa: S301 (made here)
    except Exception:
        return False


class _Rooms:
    """Asks the process with the device for the memory of large images."""

    def __init__(self, parcels: Parcels) -> None:
        self._parcels = parcels

    @contextmanager
    def room(self, size_bytes: int) -> Iterator[None]:
        """Wait until the memory may be taken, and release it after the block."""
        self._parcels.send((ROOM, size_bytes))
        self._parcels.receive()
        try:
            yield
        finally:
            self._parcels.send((ROOM_LEFT, size_bytes))
