"""Read shards and small files to their last byte."""

from __future__ import annotations

import hashlib
import io
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from http.client import HTTPException
from typing import Any, BinaryIO, cast

import pyarrow.fs as pafs

from pipeline.errors import ShardError, ShortReadError, UserError
from pipeline.storage import web
from pipeline.storage.attempts import request
from pipeline.storage.filesystems import resolve, resolved
from pipeline.storage.limits import ReadLimits, WatchedFile, within
from pipeline.storage.pipes import CommandOutput, is_command
from pipeline.storage.sources import InputVersion, ShardSource
from pipeline.storage.urls import (
    WEB_SCHEMES,
    is_local,
    local_path,
    raised_as,
    short_url,
    split_url,
    without_secrets,
)

READAHEAD_BYTES = 4 << 20
MAX_TEXT_BYTES = 256 << 20
DEFAULT_LIMITS = ReadLimits()


class _CountedStream(io.RawIOBase):
    """Passes bytes on, and raises an error if a connection ends before the end of the object."""

    def __init__(self, stream: Any, shard: ShardSource, announced_bytes: int) -> None:
        self._stream = stream
        self._shard = shard
        self._announced_bytes = announced_bytes
        self._read_bytes = 0

    def readable(self) -> bool:
        return True

    def readall(self) -> bytes:
        # by default in pieces of 8 KiB, each of which would be a request to an object store
        return b"".join(iter(lambda: self.read(READAHEAD_BYTES) or b"", b""))

    def readinto(self, buffer: Any) -> int:
        with raised_as(ShardError, self._shard.url, f"cannot be read after byte {self._read_bytes}"):
            data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._read_bytes += len(data)
        if not data and self._read_bytes < self._announced_bytes:
            raise ShortReadError(
                f"{self._shard.canonical_url}: received {self._read_bytes} of {self._announced_bytes} bytes"
            )
        return len(data)


class DigestingStream:
    """Pass the bytes of a stream on, count them, and compute their digest.

    Attributes:
        bytes_read: bytes passed on so far.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.bytes_read = 0
        self._stream = stream
        # processors have instructions for it: twice as fast as BLAKE2
        self._digest = hashlib.sha256()

    def read(self, size_bytes: int = -1, /) -> bytes:
        """Return the next bytes, at most so many; none at the end."""
        data = self._stream.read(size_bytes)
        self._digest.update(data)
        self.bytes_read += len(data)
        return data

    def digest(self) -> str:
        """Return the SHA-256 digest of the bytes so far, in hexadecimal digits."""
        return f"sha256:{self._digest.hexdigest()}"


@contextmanager
def open_shard(shard: ShardSource, limits: ReadLimits = DEFAULT_LIMITS) -> Iterator[BinaryIO]:
    """Stream a shard from its first byte.

    Args:
        shard: the shard.
        limits: how long a server, a disk or a command may take to answer, and the smallest rate at which
            bytes must arrive while somebody waits for them.

    Raises:
        ShardError: the shard cannot be opened or read, or arrives too slowly.
        ShortReadError: fewer bytes are received than the object has.
        ScratchError: a command cannot be run for want of a temporary file.
    """
    with raised_as(ShardError, shard.url, "cannot be opened"):
        stream, announced_bytes = _opened(shard, limits)
    with closing(stream):
        yield io.BufferedReader(_CountedStream(stream, shard, announced_bytes), READAHEAD_BYTES)


def _opened(shard: ShardSource, limits: ReadLimits) -> tuple[Any, int]:
    """Return a stream, and the number of bytes that it must have at least."""
    listed_bytes = shard.size_bytes or 0
    if is_command(shard.url):
        return CommandOutput(shard.url, shard.canonical_url, limits), listed_bytes
    if split_url(shard.url).scheme in WEB_SCHEMES:
        found = web.WebObject(shard.url, limits)
        if not (found.has_known_end or listed_bytes):
            found.close()
            raise OSError(
                "the server does not announce the size, so a cut would look like the end of the file"
            )
        return found, max(listed_bytes, found.announced_bytes or 0)
    if is_local(shard.url):
        return WatchedFile(partial(_open_local, shard.url), limits, READAHEAD_BYTES), listed_bytes
    return WatchedFile(partial(_open_object, shard.url), limits, READAHEAD_BYTES), listed_bytes


def _open_local(url: str, position: int) -> BinaryIO:
    path = local_path(url)
    mode = path.stat().st_mode
    # a pipe may block for ever, and a device may never end
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError("is no regular file")
    # pyarrow takes no path that is not UTF-8
    stream = path.open("rb", buffering=0)
    stream.seek(position)
    return cast(BinaryIO, stream)


def _open_object(url: str, position: int) -> Any:
    filesystem, path = resolved(url)
    if position and isinstance(filesystem, pafs.S3FileSystem):
        stream = filesystem.open_input_file(path)
        stream.seek(position)
        return stream
    stream = filesystem.open_input_stream(path)
    # pyarrow's file on Google's store has a position, but opening one did not end in tests
    while position and (skipped := stream.read(min(position, READAHEAD_BYTES))):
        position -= len(skipped)
    return stream


def version_now(shard: ShardSource) -> InputVersion:
    """Return the present version of a local file or an object of a store.

    It is empty for commands, for web servers, which are not asked, and for what no longer exists.

    Raises:
        ShardError: the store cannot be asked.
    """
    if is_command(shard.url) or split_url(shard.url).scheme in WEB_SCHEMES:
        return InputVersion()
    with raised_as(ShardError, shard.url, "cannot be looked up"), suppress(FileNotFoundError):
        return within(DEFAULT_LIMITS.total_s, _version, shard.url)
    return InputVersion()


def _version(url: str) -> InputVersion:
    if is_local(url):
        found = local_path(url).stat()
        return InputVersion(found.st_size, found.st_mtime_ns)
    info = request(url, lambda filesystem, path: filesystem.get_file_info(path))
    return InputVersion(info.size, info.mtime_ns)


def require_unchanged(shard: ShardSource, before: InputVersion) -> None:
    """Check that a shard that was read is the same version as before, and has the size that was listed.

    Times are not compared with the listing, because machines may have their own copies.

    Raises:
        ShardError: the shard has changed, so what was read may be parts of two versions.
    """
    now = version_now(shard)
    if now.differs_from(before) or (now.size_bytes and now.differs_in_size_from(shard.version)):
        raise ShardError(
            f"{shard.canonical_url}: changed since it was listed; run the same command again once it is whole"
        )


def read_bytes(url: str, *, max_bytes: int | None = None) -> bytes:
    """Return the whole content of a small file.

    Raises:
        OSError: the file cannot be read (FileNotFoundError: does not exist) or has more than `max_bytes`.
    """
    pieces: list[bytes] = []
    left = float("inf") if max_bytes is None else max_bytes
    with _opened_file(url) as stream:
        while piece := stream.read(READAHEAD_BYTES):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise OSError(f"has more than {max_bytes} bytes, the limit")
    return b"".join(pieces)


@contextmanager
def _opened_file(url: str) -> Iterator[Any]:
    if is_local(url):
        with local_path(url).open("rb") as stream:
            yield stream
    elif split_url(url).scheme in WEB_SCHEMES:
        try:
            with web.WebObject(url) as found:
                yield found
        except (OSError, HTTPException) as error:
            # the cause itself would show its secrets in a traceback
            raise OSError(without_secrets(error, url)) from None
    else:
        filesystem, path = resolve(url)
        try:
            with filesystem.open_input_stream(path) as stream:
                yield stream
        except FileNotFoundError as error:
            raise FileNotFoundError(without_secrets(error, url)) from None
        except OSError as error:
            raise OSError(without_secrets(error, url)) from None


def read_text(url: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the content of a text file that the user named, without a byte order mark.

    Raises:
        UserError: the file cannot be read, is larger than `max_bytes`, or is not UTF-8.
    """
    try:
        return read_bytes(url, max_bytes=max_bytes).decode("utf-8-sig")
    except OSError as error:
        # an operating system's error repeats the path
        problem = f"cannot be read: {error.strerror or without_secrets(error, url)}"
    except UnicodeDecodeError as error:
        problem = f"is not text in UTF-8: {error.reason} at byte {error.start}"
    raise UserError(f"{short_url(url)}: {problem}")
