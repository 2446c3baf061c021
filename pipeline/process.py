"""Set up and end the process of a command: environment for libraries, SIGTERM, exit code.

Imports nothing heavy: `skip_native_exit` and `prepare_environment` are called before ray, pyarrow and torch
are imported.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pipeline.errors import UserError

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM

# the path of a socket has at most 107 bytes; Ray's own part takes 66
MAX_RAY_FOLDER_BYTES = 40
CACHE_VARIABLES = {
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
}
# libraries also read what earlier runs cached here, so these stay in the home where they exist
READ_CACHES = {"HF_HOME": "huggingface", "TORCH_HOME": "torch"}


def skip_native_exit() -> Callable[[int], None]:
    """End this process right after Python's exit handlers, before native destructors run.

    Threads of Ray's gRPC outlive `ray.shutdown()` and race with the C++ destructors that run after Python has
    ended: once in a while a process that finished its work then dies of a segmentation fault. Ray ends its
    own workers the same way.

    Call it before ray, pyarrow and torch are imported: exit handlers run in reverse order, theirs run first.

    Returns:
        A function that sets the exit code; the process ends as usual if it is never called.
    """
    codes: list[int] = []

    def leave() -> None:
        if codes:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                # a closed pipe must not change the exit code
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(codes[-1])

    atexit.register(leave)
    return codes.append


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit with code 143 on SIGTERM inside the block, so that SIGTERM cleans up as Ctrl-C does.

    The earlier handler is restored after the block.
    """
    received: list[int] = []

    def end(signal_number: int, _frame: FrameType | None) -> NoReturn:
        received.append(signal_number)
        raise SystemExit(SIGTERM_EXIT_CODE)

    earlier_handler = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except SystemExit as ending:
        # if the signal arrives while Ray waits, Ray raises a SystemExit of its own instead
        if received:
            raise SystemExit(SIGTERM_EXIT_CODE) from ending
        raise
    finally:
        signal.signal(signal.SIGTERM, earlier_handler)


@contextlib.contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Take note of a first SIGTERM inside the block; a second one raises SystemExit with code 143.

    Returns:
        A function that returns whether a SIGTERM has arrived.
    """
    received: list[int] = []

    def note(signal_number: int, _frame: FrameType | None) -> None:
        received.append(signal_number)
        if len(received) > 1:
            raise SystemExit(SIGTERM_EXIT_CODE)

    earlier_handler = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, earlier_handler)


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Provide what Ray, torch, matplotlib and the model hub's client need and pods often lack.

    That is a writable home, a user name, a folder for temporary files whose path is short enough for Ray's
    sockets, and output streams that accept any character. Usable settings are kept.

    Args:
        environ: environment variables of this process; changed in place.

    Raises:
        UserError: no folder for temporary files is writable.
    """
    for stream in (sys.stdout, sys.stderr):
        # a Chinese caption must not end a command under a Latin locale
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    _provide_temporary_folder(environ)
    _provide_user_name(environ)
    _provide_home(environ)


def _provide_temporary_folder(environ: MutableMapping[str, str]) -> None:
    try:
        usable = tempfile.gettempdir()
    except FileNotFoundError:
        raise UserError(
            "no folder for temporary files is writable (tried TMPDIR, /tmp, /var/tmp, /usr/tmp and the "
            "working folder); set TMPDIR to a writable folder"
        ) from None
    if "TMPDIR" in environ and Path(environ["TMPDIR"]) != Path(usable):
        environ["TMPDIR"] = usable
    fits_ray = usable.isascii() and " " not in usable and len(usable) <= MAX_RAY_FOLDER_BYTES
    if "RAY_TMPDIR" not in environ and not fits_ray:
        short = [folder for folder in ("/tmp", "/var/tmp") if os.access(folder, os.W_OK | os.X_OK)]  # noqa: S108
        if short:
            environ["RAY_TMPDIR"] = short[0]


def _provide_user_name(environ: MutableMapping[str, str]) -> None:
    if any(environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        return
    import pwd

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        environ["USER"] = f"uid{os.getuid()}"


def _provide_home(environ: MutableMapping[str, str]) -> None:
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 (Path.home() raises where there is none)
    if environ.get("HOME") == "" or not home.is_absolute() or not home.is_dir():
        environ["HOME"] = str(_private_folder())
        return
    if os.access(home, os.W_OK | os.X_OK):
        return
    private = _private_folder()
    for variable, name in CACHE_VARIABLES.items():
        environ.setdefault(variable, str(private / name))
    for variable, name in READ_CACHES.items():
        if not (home / ".cache" / name).is_dir():
            environ.setdefault(variable, str(private / name))


def _private_folder() -> Path:
    """Return a folder that only this user can use; the same one each time where possible."""
    folder = Path(tempfile.gettempdir()) / f"legrad-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700)
    with contextlib.suppress(OSError):
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
    return Path(tempfile.mkdtemp(prefix="legrad-"))
