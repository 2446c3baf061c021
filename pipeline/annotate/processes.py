"""Sample processes: start them, send them work, and replace those that die or hang; without Ray."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.annotate.parcels import ENDS_OF_CONNECTION, Parcels

# Kinds of messages. `sample_process` is the other end; it imports torch, so it is not imported here.
READY, DONE, FAILED, ROOM, ROOM_LEFT = "ready", "done", "failed", "room", "room left"
FORK, EXIT_CODE, KILL = "fork", "exit code", "kill"
# tasks of a sample process: methods of `SampleWork`
PREPARE, FINISH = "prepare", "finish"
# Ctrl-C is sent to every process of a terminal; only the process that started the launcher handles it
_COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import sys; sys.path[:] = {path!r}; "
    "from pipeline.annotate.sample_process import serve_launcher; serve_launcher({descriptor})"
)
# A process uses one thread and no GPU. It keeps the memory of a few images: by default, the C library returns
# it to the kernel after every image, and fresh pages cost as much as decoding.
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
_EXIT_TIMEOUT_S = 10.0
# When memory runs out, the kernel kills the process with the highest score first; Ray sets 1000 for workers.
OOM_SCORE_FILE = Path("/proc/self/oom_score_adj")
MOST_OOM_SCORE = 1000
_OOM_SCORE_WITH_DEVICE = 900
_START_TIMEOUT_S = 120.0
_ATTEMPTS_TO_START = 3
CLOSED = "the sample processes were closed"


class ProcessDied(Exception):
    """A sample process ended before it answered; the message says how."""


class ProcessTimedOut(ProcessDied):
    """A sample process did not answer in time, and was killed."""


class MemoryGate:
    """Limits the memory of large images that are decoded at a time; an image above the limit is alone.

    Args:
        max_bytes: sum over all that have entered and not left.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._held_bytes = 0

    def enter(self, size_bytes: int) -> None:
        """Wait until there is room; callers enter in the order of their arrival."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(lambda: self._waiting[0] is ticket and self._has_room(size_bytes))
            self._waiting.popleft()
            self._held_bytes += size_bytes
            self._changed.notify_all()

    def leave(self, size_bytes: int) -> None:
        """Release memory that was taken by `enter`."""
        with self._changed:
            self._held_bytes -= size_bytes
            self._changed.notify_all()

    @contextmanager
    def room(self, size_bytes: int) -> Iterator[None]:
        """Hold memory during the block."""
        self.enter(size_bytes)
        try:
            yield
        finally:
            self.leave(size_bytes)

    def _has_room(self, size_bytes: int) -> bool:
        return not self._held_bytes or self._held_bytes + size_bytes <= self._max_bytes


class SampleProcesses:
    """Processes that work on samples; each runs one task at a time, and is replaced when it dies.

    The launcher starts at once and imports what processes need; a process starts with its first task.

    Args:
        count: number of processes.
        max_room_bytes: memory that large images take at a time, over all processes.
        timeout_s: seconds after which a process that has not answered is killed; it may wait longer for
            memory. None: never.
    """

    def __init__(self, count: int, max_room_bytes: int, timeout_s: float | None = None) -> None:
        _be_killed_after_sample_processes()
        self._gate = MemoryGate(max_room_bytes)
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        self._launcher = _Launcher(self._closed)
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)

    def run(self, settings: Any, task: str, content: Any) -> Any:
        """Run a task of `SampleWork` in the next idle process, and return its result.

        Args:
            settings: of the work; the same with every call.
            task: its name.
            content: its argument.

        Raises:
            ProcessDied: the process ended before it answered.
            ProcessTimedOut: it did not answer in time.
            RuntimeError: no process can be started, or all were closed.
            Exception: whatever the task raised.
        """
        process = self._idle.get()
        try:
            if self._closed.is_set():
                raise RuntimeError(CLOSED)
            process = self._living(process) or self._started(settings)
            kind, value = process.ask(task, content, self._gate)
        except BaseException as error:
            # after any fault, the next answer of this process might be the one to this task
            lost, process = process, None
            code = None if lost is None else lost.end(self._launcher)
            if not isinstance(error, ProcessDied):
                raise
            if self._closed.is_set():
                raise RuntimeError(CLOSED) from error
            if isinstance(error, ProcessTimedOut):
                limit = f"{self._timeout_s:g} s, the limit of run.sample_timeout_s"
                raise ProcessTimedOut(f"did not finish within {limit}, and was killed") from error
            raise ProcessDied(_how_it_ended(code)) from error
        finally:
            self._idle.put(process)
        if kind == FAILED:
            raise value
        return value

    def close(self) -> None:
        """End all processes; calls that are running, and later ones, raise RuntimeError."""
        self._launcher.close()
        idle: list[_Process | None] = []
        with suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for process in idle:
            if process is not None:
                # it outlives a launcher that was killed, until its connection is closed
                process.end(self._launcher)
            self._idle.put(None)

    def _living(self, process: _Process | None) -> _Process | None:
        """Return the process, or None if it died while it was idle, which no task has caused."""
        if process is None or not process.has_ended():
            return process
        process.end(self._launcher)
        return None

    def _started(self, settings: Any) -> _Process:
        # a process may be killed while it starts; one that fails every time will never start
        for _ in range(_ATTEMPTS_TO_START):
            process = _Process(*self._launcher.fork())
            try:
                process.welcome(settings, self._timeout_s)
            except ProcessDied:
                ending = _how_it_ended(process.end(self._launcher))
            except BaseException:
                process.end(self._launcher)
                raise
            else:
                return process
        raise RuntimeError(
            f"a sample process did not start, {_ATTEMPTS_TO_START} times; the last one {ending}"
        )


class _Process:
    def __init__(self, pid: int, parcels: Parcels) -> None:
        self._pid = pid
        self._parcels = parcels
        self._is_hanging = False

    def welcome(self, settings: Any, timeout_s: float | None) -> None:
        """Send the settings, wait until the process is ready, and limit the waits for later answers."""
        self._parcels.limit_waits(_START_TIMEOUT_S)
        self._exchange(settings)
        self._parcels.limit_waits(timeout_s)

    def ask(self, task: str, content: Any, gate: MemoryGate) -> tuple[str, Any]:
        """Run a task, and return DONE and its result, or FAILED and what it raised.

        Memory that the process asks for during the task is taken from the gate.
        """
        held_bytes = 0
        message: Any = (task, content)
        try:
            while True:
                kind, value = self._exchange(message)
                while kind == ROOM_LEFT:
                    gate.leave(value)
                    held_bytes -= value
                    kind, value = self._next()
                if kind != ROOM:
                    return kind, value
                gate.enter(value)
                held_bytes += value
                message = READY
        finally:
            if held_bytes:
                gate.leave(held_bytes)

    def has_ended(self) -> bool:
        """Return whether the process, which is idle, has died."""
        # an idle process sends nothing, so only the end of its connection can arrive
        return self._parcels.has_arrived()

    def end(self, launcher: _Launcher) -> int | None:
        """End the process unless it has died, and return its exit code; None where it is not known."""
        self._parcels.close()
        return launcher.exit_code(self._pid, kill=self._is_hanging)

    def _exchange(self, message: Any) -> Any:
        with self._deaths_raised():
            self._parcels.send(message)
        return self._next()

    def _next(self) -> Any:
        with self._deaths_raised():
            return self._parcels.receive()

    @contextmanager
    def _deaths_raised(self) -> Iterator[None]:
        try:
            yield
        except ENDS_OF_CONNECTION as error:
            raise ProcessDied from error
        except BlockingIOError as error:
            self._is_hanging = True
            raise ProcessTimedOut from error


class _Launcher:
    """The process that forks sample processes; one that was killed is started again.

    Args:
        closed: set once the launcher is closed or this Python ends; nothing is started after that.
    """

    def __init__(self, closed: threading.Event) -> None:
        self._lock = threading.Lock()
        self._closed = closed
        self._is_new = True
        self._start()

    def fork(self) -> tuple[int, Parcels]:
        """Return the id of a new process, and the connection to it."""
        with self._lock:
            for _ in range(_ATTEMPTS_TO_START):
                with suppress(EOFError, OSError):
                    return self._forked()
                # the launcher was killed
                self._finalizer.detach()
                _end(self._popen, self._connection)
                self._start()
            raise RuntimeError(f"the launcher of sample processes ended {_ATTEMPTS_TO_START} times")

    def exit_code(self, pid: int, *, kill: bool = False) -> int | None:
        """Return the exit code of a process that is ending; None if the launcher has ended too.

        Args:
            pid: of the process.
            kill: it would not end by itself.
        """
        with self._lock:
            try:
                self._requests.send((KILL if kill else EXIT_CODE, pid))
                code: int | None = self._requests.receive()
            except (EOFError, OSError):
                return None
            return code

    def close(self) -> None:
        """End the launcher, which kills its processes."""
        self._closed.set()
        with self._lock:
            if self._is_new:
                # it is importing, and has no processes
                self._popen.kill()
            self._finalizer()

    def _forked(self) -> tuple[int, Parcels]:
        if self._closed.is_set():
            raise RuntimeError(CLOSED)
        if self._is_new:
            self._requests.receive()
            self._is_new = False
        here, there = _connected_pair()
        with there:
            self._requests.send((FORK, 0))
            reduction.send_handle(self._connection, there.fileno(), self._popen.pid)
        pid: int = self._requests.receive()
        return pid, Parcels(here)

    def _start(self) -> None:
        here, there = _connected_pair()
        with there:
            descriptor = there.fileno()
            command = _COMMAND.format(path=sys.path, descriptor=descriptor)
            self._popen = subprocess.Popen(  # noqa: S603 (this Python, and code of this package)
                [sys.executable, "-c", command],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT},
            )
        self._connection = here
        self._requests = Parcels(here)
        self._is_new = True
        # the launcher ends with this process, however that ends, because its connection is closed then
        self._finalizer = weakref.finalize(self, _close, self._closed, self._popen, here)


def _close(closed: threading.Event, popen: subprocess.Popen[bytes], connection: Connection) -> None:
    closed.set()
    _end(popen, connection)


def _be_killed_after_sample_processes() -> None:
    """Lower the score of this process, which holds a model, below theirs; raised scores may be lowered."""
    with suppress(OSError, ValueError):
        if int(OOM_SCORE_FILE.read_text()) > _OOM_SCORE_WITH_DEVICE:
            OOM_SCORE_FILE.write_text(str(_OOM_SCORE_WITH_DEVICE))


def _end(popen: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    try:
        popen.wait(_EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        popen.kill()
        popen.wait()


def _connected_pair() -> tuple[Connection, Connection]:
    here, there = socket.socketpair()
    return Connection(here.detach()), Connection(there.detach())


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is None:
        return "ended"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    reason = ", as the kernel does where memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name}{reason}"
