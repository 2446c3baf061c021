"""Temporary files outside the output folder: a machine that cannot hold them is named as the cause."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.errors import ScratchError

IN_MEMORY_BYTES = 64 << 20


class Spool(tempfile.SpooledTemporaryFile[bytes]):
    """A temporary file, in memory up to `max_size` bytes and on the machine's temporary disk above that.

    Raises:
        ScratchError: the disk cannot take what is written.
    """

    def __init__(self, max_size: int = IN_MEMORY_BYTES) -> None:
        super().__init__(max_size)

    def write(self, data: Any) -> int:
        """Append bytes at the current position."""
        with scratch_errors():
            return super().write(data)

    def flush(self) -> None:
        """Write out what is buffered."""
        with scratch_errors():
            super().flush()

    def close(self) -> None:
        """Delete the file; what cannot be written any more was not wanted either."""
        with suppress(OSError):
            super().close()

    def __exit__(self, *ending: object) -> None:
        self.close()

    def seek(self, *position: int) -> int:
        """Move to a position; what is buffered is written before."""
        with scratch_errors():
            return super().seek(*position)


@contextmanager
def scratch_errors() -> Iterator[None]:
    """Replace errors of temporary files by a ScratchError that names their folder and the way out."""
    try:
        yield
    except OSError as error:
        raise ScratchError(
            f"temporary files cannot be written in {_folder()} on this machine: {error.strerror or error}; "
            "free space there, or set TMPDIR to a folder with more space"
        ) from error


def _folder() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return "any folder for temporary files"
