"""What libraries expect of the process around them, where pods and plain accounts lack it.

A home that can be written, a name for the user, a folder for temporary files that is short enough for
sockets, and output that takes any character. Ray, torch, matplotlib and the hub's client end in a traceback
without them. Nothing that is set is overruled unless it cannot be used.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from pipeline.errors import UserError

# a socket's path has at most 107 bytes, of which ray's own part takes 66
LONGEST_RAY_FOLDER_BYTES = 40
CACHE_VARIABLES = {
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
}
# where these are, is read too: they stay in the home if they are there
READ_CACHES = {"HF_HOME": "huggingface", "TORCH_HOME": "torch"}


def settle_in(environ: MutableMapping[str, str] = os.environ) -> None:
    """Give libraries what they expect of the environment, before they are imported.

    Raises:
        UserError: no folder for temporary files can be written.
    """
    for stream in (sys.stdout, sys.stderr):
        # a caption in Chinese is no reason to end under a Latin locale
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    _settle_temporary_folder(environ)
    _settle_user_name(environ)
    _settle_home(environ)


def _settle_temporary_folder(environ: MutableMapping[str, str]) -> None:
    try:
        usable = tempfile.gettempdir()
    except FileNotFoundError:
        raise UserError(
            "no folder for temporary files can be written (tried TMPDIR, /tmp, /var/tmp, /usr/tmp and the "
            "working folder); set TMPDIR to one"
        ) from None
    if "TMPDIR" in environ and Path(environ["TMPDIR"]) != Path(usable):
        environ["TMPDIR"] = usable
    if "RAY_TMPDIR" not in environ and not _fits_ray(usable):
        short = [folder for folder in ("/tmp", "/var/tmp") if os.access(folder, os.W_OK | os.X_OK)]  # noqa: S108
        if short:
            environ["RAY_TMPDIR"] = short[0]


def _fits_ray(folder: str) -> bool:
    return folder.isascii() and " " not in folder and len(folder) <= LONGEST_RAY_FOLDER_BYTES


def _settle_user_name(environ: MutableMapping[str, str]) -> None:
    if any(environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        return
    import pwd

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        environ["USER"] = f"uid{os.getuid()}"


def _settle_home(environ: MutableMapping[str, str]) -> None:
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 (which raises where there is none)
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
    """A folder that this user alone can use, the same each time."""
    folder = Path(tempfile.gettempdir()) / f"legrad-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700)
    with contextlib.suppress(OSError):
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
    return Path(tempfile.mkdtemp(prefix="legrad-"))
