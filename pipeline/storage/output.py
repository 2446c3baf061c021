"""The output folder: listing, publishing in one step, removing."""

from __future__ import annotations

import io
import mmap
import os
import posixpath
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

import pyarrow.fs as pafs

from pipeline.errors import OutputError
from pipeline.storage.filesystems import resolve, resolved
from pipeline.storage.urls import join_url, told_as

TEMPORARY_PREFIX = ".tmp-"
BLOCK_BYTES = 4 << 20
IN_MEMORY_BYTES = 64 << 20
# four parts of pyarrow's, which keeps a copy of what it has not sent
UPLOAD_BYTES_AT_ONCE = 40 << 20


def list_names(folder_url: str) -> set[str]:
    """Names of the files directly in a folder, temporary ones left out; a missing folder has none.

    Raises:
        OutputError: the folder cannot be listed.
    """
    with told_as(OutputError, folder_url, "cannot be listed"):
        filesystem, path = resolved(folder_url)
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return {
        info.base_name for info in infos if info.is_file and not info.base_name.startswith(TEMPORARY_PREFIX)
    }


def publish(folder_url: str, name: str, content: IO[bytes] | bytes) -> None:
    """Make a file appear under its final name whole, or not at all; replaces an earlier one.

    Local: a temporary file in the same folder, fsync, rename. Object stores: one completed upload.

    Raises:
        OutputError: it cannot be written; the path and the cause are in the message.
    """
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    stream.seek(0)
    with told_as(OutputError, join_url(folder_url, name), "cannot be written"):
        filesystem, folder = resolved(folder_url)
        if isinstance(filesystem, pafs.LocalFileSystem):
            _publish_local(Path(folder), name, stream)
        else:
            _publish_object(filesystem, posixpath.join(folder, name), _in_one_piece(stream))


def _in_one_piece(stream: IO[bytes]) -> bytes | mmap.mmap:
    """The whole content; a large file on disk is mapped, so that it does not fill the memory."""
    size_bytes = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if size_bytes > IN_MEMORY_BYTES:
        with suppress(io.UnsupportedOperation):
            return mmap.mmap(stream.fileno(), size_bytes, access=mmap.ACCESS_READ)
    return stream.read()


def _publish_object(filesystem: pafs.FileSystem, path: str, content: bytes | mmap.mmap) -> None:
    """Upload whole, or not at all.

    Closing or dropping pyarrow's stream publishes whatever was written, even after an exception. So the
    content is complete before the stream is opened, and is written by a thread, where no Ctrl-C arrives.
    """

    def upload() -> None:
        view = memoryview(content)
        with filesystem.open_output_stream(path) as sink:
            for start in range(0, len(view), UPLOAD_BYTES_AT_ONCE):
                sink.write(view[start : start + UPLOAD_BYTES_AT_ONCE])
                sink.flush()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(upload).result()


def _publish_local(folder: Path, name: str, stream: IO[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{name}"
    try:
        with temporary.open("xb") as sink:
            while block := stream.read(BLOCK_BYTES):
                sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(folder / name)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def exists(folder_url: str, name: str) -> bool:
    """Whether a file of that name is there; raises OutputError where that cannot be told."""
    with told_as(OutputError, join_url(folder_url, name), "cannot be looked up"):
        filesystem, folder = resolved(folder_url)
        return bool(filesystem.get_file_info(posixpath.join(folder, name)).is_file)


def remove(folder_url: str, name: str) -> None:
    """Delete a file if it is there; raises OutputError where that is not allowed."""
    with told_as(OutputError, join_url(folder_url, name), "cannot be removed"):
        filesystem, folder = resolved(folder_url)
        path = posixpath.join(folder, name)
        # another job may remove it in between
        with suppress(FileNotFoundError):
            if filesystem.get_file_info(path).is_file:
                filesystem.delete_file(path)


def sweep_temporary_files(folder_url: str, *, older_than_s: float, now_s: float) -> int:
    """Delete temporary files that a killed writer left in a local folder.

    Args:
        folder_url: the folder; object stores have no temporary files.
        older_than_s: younger ones may belong to a job that is running.
        now_s: seconds since the epoch.

    Returns:
        How many were deleted.
    """
    filesystem, folder = resolve(folder_url)
    if not isinstance(filesystem, pafs.LocalFileSystem) or not Path(folder).is_dir():
        return 0
    swept = 0
    for path in Path(folder).glob(f"{TEMPORARY_PREFIX}*"):
        # another job may just have renamed its own
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < now_s - older_than_s:
                path.unlink()
                swept += 1
    return swept
