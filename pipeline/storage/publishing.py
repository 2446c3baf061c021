"""Write into folders: list, publish in one step, move and remove files."""

from __future__ import annotations

import errno
import io
import mmap
import os
import posixpath
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pyarrow.fs as pafs

from pipeline.errors import OutputError
from pipeline.storage.attempts import request
from pipeline.storage.filesystems import resolve, resolved
from pipeline.storage.scratch import IN_MEMORY_BYTES
from pipeline.storage.sources import InputVersion
from pipeline.storage.urls import is_local, join_url, local_path, raised_as
from pipeline.text import printable

TEMPORARY_SUFFIX = ".part"
BLOCK_BYTES = 4 << 20
# four of pyarrow's parts; it keeps a copy of what has not been sent
UPLOAD_BYTES_AT_ONCE = 40 << 20


def list_names(folder_url: str) -> set[str]:
    """Return the names of the files in a folder, except temporary ones; none if there is no such folder.

    Raises:
        OutputError: the folder cannot be listed.
    """
    return set(list_versions(folder_url))


def list_versions(folder_url: str) -> dict[str, InputVersion]:
    """Return size and time of change of the files in a folder, by name, as `list_names` lists them.

    Raises:
        OutputError: the folder cannot be listed.
    """
    with raised_as(OutputError, folder_url, "cannot be listed"):
        versions = request(folder_url, _versions)
    return {name: found for name, found in versions.items() if not name.endswith(TEMPORARY_SUFFIX)}


def _versions(filesystem: pafs.FileSystem, path: str) -> dict[str, InputVersion]:
    if isinstance(filesystem, pafs.LocalFileSystem):
        return _local_versions(path)
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return {info.base_name: InputVersion(info.size, info.mtime_ns) for info in infos if info.is_file}


def _local_versions(path: str) -> dict[str, InputVersion]:
    # pyarrow fails at names that are not UTF-8
    if not os.path.exists(path):  # noqa: PTH110
        return {}
    versions = {}
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                found = entry.stat()
            except OSError as error:
                # removed by another job in between, or a link that leads nowhere
                if error.errno in (errno.ENOENT, errno.ELOOP):
                    continue
                raise
            if stat.S_ISREG(found.st_mode):
                versions[entry.name] = InputVersion(found.st_size, found.st_mtime_ns)
    return versions


def list_entries(folder_url: str) -> set[str]:
    """Return the names of everything in a folder: files, links and folders; none if there is no such folder.

    Raises:
        OutputError: the folder cannot be listed.
    """
    with raised_as(OutputError, folder_url, "cannot be listed"):
        filesystem, path = resolved(folder_url)
        if isinstance(filesystem, pafs.LocalFileSystem):
            # pyarrow skips links to nowhere
            return set(os.listdir(path)) if os.path.lexists(path) else set()  # noqa: PTH208
        infos = request(
            folder_url,
            lambda filesystem, path: filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True)),
        )
        return {info.base_name for info in infos}


def list_paths(folder_url: str) -> set[str]:
    """Return the paths of all files below a folder, relative to it, except temporary ones.

    Raises:
        OutputError: the folder cannot be listed.
    """
    with raised_as(OutputError, folder_url, "cannot be listed"):
        path, infos = request(
            folder_url,
            lambda filesystem, path: (
                path,
                filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True)),
            ),
        )
    start = len(path.rstrip("/")) + 1
    try:
        paths = {info.path[start:] for info in infos if info.is_file}
    except UnicodeDecodeError as error:
        name = printable(os.fsdecode(error.object))
        raise OutputError(f"{name}: a name that is not UTF-8; rename the file") from None
    return {found for found in paths if not found.endswith(TEMPORARY_SUFFIX)}


def publish(
    folder_url: str, name: str, content: IO[bytes] | bytes, *, staging_url: str | None = None
) -> None:
    """Make a file appear under its final name, whole or not at all; replace an earlier one.

    Local: a temporary file, fsync, rename. Object stores: one completed upload. What fails for a passing
    reason is repeated for about a minute; a full disk or a refusal is an error at once.

    Args:
        folder_url: folder of the file.
        name: its final name.
        content: its bytes; a stream is read from its beginning.
        staging_url: local folder for the temporary file, outside of what readers of `folder_url` search;
            None: the temporary file is beside the final one, hidden, and its name ends in ``.part``.

    Raises:
        OutputError: the file cannot be written; the message has the path and the cause.
        ScratchError: what is left to write of a `Spool` does not fit this machine's temporary disk.
    """
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    with raised_as(OutputError, join_url(folder_url, name), "cannot be written"):
        staging = None if staging_url is None or not is_local(staging_url) else local_path(staging_url)

        def put(filesystem: pafs.FileSystem, folder: str) -> None:
            stream.seek(0)
            if isinstance(filesystem, pafs.LocalFileSystem):
                _publish_local(Path(folder), name, stream, staging)
            else:
                _publish_object(filesystem, posixpath.join(folder, name), _in_one_piece(stream))

        request(folder_url, put)


def _in_one_piece(stream: IO[bytes]) -> bytes | mmap.mmap:
    """Return the whole content; map a large file on disk, so that it does not fill the memory."""
    size_bytes = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if size_bytes > IN_MEMORY_BYTES:
        with suppress(io.UnsupportedOperation):
            return mmap.mmap(stream.fileno(), size_bytes, access=mmap.ACCESS_READ)
    return stream.read()


def _publish_object(filesystem: pafs.FileSystem, path: str, content: bytes | mmap.mmap) -> None:
    """Upload an object, whole or not at all.

    Closing or deleting pyarrow's stream publishes what was written, even after an exception. So the content
    is complete before the stream is opened, and a thread writes it, which Ctrl-C does not interrupt.
    """

    def upload() -> None:
        view = memoryview(content)
        with filesystem.open_output_stream(path) as sink:
            for start in range(0, len(view), UPLOAD_BYTES_AT_ONCE):
                sink.write(view[start : start + UPLOAD_BYTES_AT_ONCE])
                sink.flush()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(upload).result()


def _publish_local(folder: Path, name: str, stream: IO[bytes], staging: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if staging is None:
        temporary = _beside(folder / name)
    else:
        staging.mkdir(parents=True, exist_ok=True)
        temporary = staging / f"{uuid.uuid4().hex}-{folder.name}-{name}{TEMPORARY_SUFFIX}"
    with _removed_on_failure(temporary):
        with temporary.open("xb") as sink:
            while block := stream.read(BLOCK_BYTES):
                sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
        _rename(temporary, folder / name)


def _beside(path: Path) -> Path:
    return path.with_name(f".{uuid.uuid4().hex}-{path.name}{TEMPORARY_SUFFIX}")


@contextmanager
def _removed_on_failure(temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _rename(source: Path, target: Path) -> None:
    """Rename a file, also to another file system, where the target still appears in one step."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = _beside(target)
        with _removed_on_failure(beside):
            shutil.copyfile(source, beside)
            with beside.open("rb+") as copied:
                os.fsync(copied.fileno())
            beside.replace(target)
        source.unlink()


def move(folder_url: str, name: str, to_folder_url: str, to_name: str) -> bool:
    """Move a file within one store.

    Returns:
        Whether the file existed.

    Raises:
        OutputError: the file cannot be moved.
    """
    with raised_as(OutputError, join_url(folder_url, name), "cannot be moved"):
        _, to_folder = resolved(to_folder_url)
        target = posixpath.join(to_folder, to_name)

        def move_once(filesystem: pafs.FileSystem, folder: str) -> bool:
            source = posixpath.join(folder, name)
            if not filesystem.get_file_info(source).is_file:
                # perhaps moved by an attempt whose answer was lost
                return bool(filesystem.get_file_info(target).is_file)
            # another job may move it in between
            with suppress(FileNotFoundError):
                if isinstance(filesystem, pafs.LocalFileSystem):
                    Path(to_folder).mkdir(parents=True, exist_ok=True)
                    _rename(Path(source), Path(target))
                else:
                    filesystem.move(source, target)
                return True
            return False

        return request(folder_url, move_once)


def exists(folder_url: str, name: str) -> bool:
    """Return whether a file exists; raise OutputError if the store cannot be asked."""
    with raised_as(OutputError, join_url(folder_url, name), "cannot be looked up"):
        return request(
            folder_url,
            lambda filesystem, folder: bool(filesystem.get_file_info(posixpath.join(folder, name)).is_file),
        )


def remove(folder_url: str, name: str) -> None:
    """Delete a file if it exists; raise OutputError if that is not allowed."""
    with raised_as(OutputError, join_url(folder_url, name), "cannot be removed"):
        request(folder_url, lambda filesystem, folder: _remove(filesystem, posixpath.join(folder, name)))


def _remove(filesystem: pafs.FileSystem, path: str) -> None:
    # another job may remove it in between
    with suppress(FileNotFoundError):
        if filesystem.get_file_info(path).is_file:
            filesystem.delete_file(path)


def sweep_staging(folder_url: str, *, idle_for_s: float) -> int:
    """Delete the temporary files of killed runs in a local staging folder, which has a folder for each run.

    Args:
        folder_url: the folder above those of the runs; object stores have none.
        idle_for_s: seconds without a write after which a run's folder is deleted; until then the run may be
            alive.

    Returns:
        The number of runs whose folders were deleted.
    """
    filesystem, path = resolve(folder_url)
    if not isinstance(filesystem, pafs.LocalFileSystem) or not Path(path).is_dir():
        return 0
    cutoff_s = time.time() - idle_for_s
    idle = [run for run in Path(path).iterdir() if not run.is_symlink() and _last_touched_s(run) < cutoff_s]
    return sum(_removed_with_its_files(run) for run in idle)


def remove_staging(folder_url: str) -> None:
    """Delete the local staging folder of a run and the temporary files in it."""
    filesystem, path = resolve(folder_url)
    if isinstance(filesystem, pafs.LocalFileSystem):
        _removed_with_its_files(Path(path))


def _last_touched_s(run: Path) -> float:
    times = [run.lstat().st_mtime]
    for file in run.glob(f"*{TEMPORARY_SUFFIX}"):
        # another job may just have renamed it
        with suppress(FileNotFoundError):
            times.append(file.lstat().st_mtime)
    return max(times)


def _removed_with_its_files(run: Path) -> bool:
    """Remove a run's folder, unless it holds other files than temporary ones."""
    with suppress(OSError):
        for file in run.glob(f"*{TEMPORARY_SUFFIX}"):
            file.unlink(missing_ok=True)
        run.rmdir()
        return True
    return False
