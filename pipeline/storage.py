"""Files wherever they live: naming, listing, reading to the last byte, and publishing in one step."""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit, urlunsplit

import braceexpand
import fsspec
import pyarrow.fs as pafs

from pipeline.errors import OutputError, ShardError, ShortReadError, UserError

READAHEAD_BYTES = 4 << 20
TEMPORARY_PREFIX = ".tmp-"
OBJECT_SCHEMES = ("s3", "gs", "gcs")
WEB_SCHEMES = ("http", "https")
COMMAND_PREFIX = "pipe:"


@dataclass(frozen=True)
class ShardSource:
    """One input tar.

    Attributes:
        shard_id: names the output files: the stem, reduced to [A-Za-z0-9._-], and a digest of the URL.
        url: what is opened; may carry a signature, so it is never written down.
        canonical_url: absolute, without user info and query.
        size_bytes: size of the object; None where the server does not tell.
    """

    shard_id: str
    url: str
    canonical_url: str
    size_bytes: int | None


def canonical_url(url: str) -> str:
    """The absolute URL of a file without user info, query and fragment.

    Local paths become ``file://`` URLs.
    """
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return _local_path(url).as_uri()
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def without_credentials(pattern: str) -> str:
    """A path or URL pattern as it may be written down: user info, query and fragment removed from URLs."""
    parts = urlsplit(pattern)
    if parts.scheme not in (*OBJECT_SCHEMES, *WEB_SCHEMES):
        return pattern
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _local_path(url: str) -> Path:
    is_url = url.startswith("file://")
    return Path(unquote(urlsplit(url).path) if is_url else url).absolute()


def shard_id(url: str) -> str:
    """The name of a shard's output files: reduced stem, dash, 8 hexadecimal digits of the URL's digest."""
    canonical = canonical_url(url)
    stem = posixpath.basename(urlsplit(canonical).path).split(".", 1)[0]
    reduced = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:80] or "shard"
    return f"{reduced}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def list_shards(patterns: str | list[str]) -> list[ShardSource]:
    """Expand shard patterns to a sorted list without repetitions.

    Args:
        patterns: paths or URLs with braces and globs; ``@FILE`` reads patterns from a text file, one a line.

    Returns:
        The shards, sorted by canonical URL.

    Raises:
        UserError: nothing matches a pattern, or the pattern would run a command.
    """
    urls: dict[str, str] = {}
    for pattern in _spelled_out([patterns] if isinstance(patterns, str) else patterns):
        matches = _matches(pattern)
        if not matches:
            raise UserError(f"input.shards: nothing matches {canonical_url(pattern)}")
        urls |= {canonical_url(url): url for url in matches}
    return [
        ShardSource(shard_id(canonical), url, canonical, _size_bytes(url))
        for canonical, url in sorted(urls.items())
    ]


def _spelled_out(patterns: list[str]) -> Iterator[str]:
    for pattern in patterns:
        if pattern.startswith("@"):
            yield from _spelled_out(_lines(pattern[1:]))
        elif pattern.startswith(COMMAND_PREFIX):
            raise UserError(f"input.shards: {pattern.split()[0]!r} would run a command; give a path or a URL")
        else:
            yield from braceexpand.braceexpand(pattern)


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"input.shards: the list {path} cannot be read: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _matches(pattern: str) -> list[str]:
    scheme = urlsplit(pattern).scheme
    if scheme in WEB_SCHEMES or not any(character in pattern for character in "*?["):
        return [pattern]
    filesystem, path = resolve(pattern)
    folder = re.split(r"/[^/]*[*?\[]", path, maxsplit=1)[0]
    selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
    glob = re.compile(_glob_regex(path))
    found = [
        info.path for info in filesystem.get_file_info(selector) if info.is_file and glob.fullmatch(info.path)
    ]
    return [_url_of(scheme, path) for path in found]


def _glob_regex(glob: str) -> str:
    tokens = re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", glob)
    known = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(token) or (token if token.startswith("[") and token.endswith("]") else re.escape(token))
        for token in tokens
    )


def _url_of(scheme: str, path: str) -> str:
    return path if scheme in ("", "file") else f"{scheme}://{path}"


def _size_bytes(url: str) -> int | None:
    try:
        filesystem, path = resolve(url)
        size = filesystem.get_file_info(path).size
    except OSError:
        return None
    return cast("int | None", size)


def resolve(url: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem that serves a path or URL, and the path within it.

    Raises:
        UserError: the scheme is not one of local, s3, gs, http and https.
    """
    scheme = urlsplit(url).scheme
    if scheme in ("", "file"):
        return pafs.LocalFileSystem(), str(_local_path(url))
    if scheme in WEB_SCHEMES:
        return _web_filesystem(), url
    if scheme in OBJECT_SCHEMES:
        parts = urlsplit(url)
        query = f"?{parts.query}" if parts.query else ""
        filesystem = _object_filesystem(f"{scheme}://{parts.netloc}/{query}")
        return filesystem, f"{parts.netloc.rpartition('@')[2]}{parts.path}"
    raise UserError(
        f"{canonical_url(url)}: expected a local path, s3://, gs:// or http(s)://, got scheme {scheme!r}"
    )


@lru_cache(maxsize=64)
def _object_filesystem(root_url: str) -> pafs.FileSystem:
    filesystem, _ = pafs.FileSystem.from_uri(root_url)
    return filesystem


@lru_cache(maxsize=1)
def _web_filesystem() -> pafs.FileSystem:
    return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("http", block_size=READAHEAD_BYTES)))


class _CountedStream(io.RawIOBase):
    """Passes bytes on and tells a connection that ended early from the end of the object."""

    def __init__(self, stream: Any, shard: ShardSource) -> None:
        self._stream = stream
        self._shard = shard
        self._read_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._read_bytes += len(data)
        expected_bytes = self._shard.size_bytes
        if not data and expected_bytes is not None and self._read_bytes < expected_bytes:
            raise ShortReadError(
                f"{self._shard.canonical_url}: only {self._read_bytes} of {expected_bytes} bytes came"
            )
        return len(data)


@contextmanager
def open_shard(shard: ShardSource) -> Iterator[BinaryIO]:
    """Stream a shard from its first byte.

    Raises:
        ShardError: it cannot be opened or read.
        ShortReadError: fewer bytes come than the object holds.
    """
    try:
        filesystem, path = resolve(shard.url)
        with filesystem.open_input_stream(path, buffer_size=READAHEAD_BYTES) as stream:
            yield io.BufferedReader(_CountedStream(stream, shard), READAHEAD_BYTES)
    except OSError as error:
        raise ShardError(f"{shard.canonical_url}: {_without_secrets(error, shard.url)}") from error


def _without_secrets(error: Exception, url: str) -> str:
    return str(error).replace(url, canonical_url(url))


def read_bytes(url: str) -> bytes:
    """The whole content of a small file; raises FileNotFoundError or another OSError."""
    filesystem, path = resolve(url)
    with filesystem.open_input_stream(path) as stream:
        return cast(bytes, stream.read())


def list_names(folder_url: str) -> set[str]:
    """Names of the files directly in a folder, temporary ones left out; a missing folder has none."""
    filesystem, path = resolve(folder_url)
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return {
        info.base_name for info in infos if info.is_file and not info.base_name.startswith(TEMPORARY_PREFIX)
    }


def join_url(folder_url: str, *names: str) -> str:
    """The URL of something in a folder."""
    return posixpath.join(folder_url, *names)


def publish(folder_url: str, name: str, content: IO[bytes] | bytes) -> None:
    """Make a file appear under its final name whole, or not at all; replaces an earlier one.

    Local: a temporary file in the same folder, fsync, rename. Object stores: one completed put.

    Raises:
        OutputError: it cannot be written; the path and the cause are in the message.
    """
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    stream.seek(0)
    filesystem, folder = resolve(folder_url)
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            _publish_local(Path(folder), name, stream)
        else:
            with filesystem.open_output_stream(posixpath.join(folder, name)) as sink:
                while block := stream.read(READAHEAD_BYTES):
                    sink.write(block)
    except OSError as error:
        raise OutputError(
            f"{join_url(canonical_url(folder_url), name)}: cannot be written: {error}"
        ) from error


def _publish_local(folder: Path, name: str, stream: IO[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{name}"
    try:
        with temporary.open("xb") as sink:
            while block := stream.read(READAHEAD_BYTES):
                sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(folder / name)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def exists(folder_url: str, name: str) -> bool:
    """Whether a file of that name is there."""
    filesystem, folder = resolve(folder_url)
    return bool(filesystem.get_file_info(posixpath.join(folder, name)).is_file)


def remove(folder_url: str, name: str) -> None:
    """Delete a file if it is there; raises OutputError where that is not allowed."""
    filesystem, folder = resolve(folder_url)
    path = posixpath.join(folder, name)
    try:
        if filesystem.get_file_info(path).is_file:
            filesystem.delete_file(path)
    except OSError as error:
        raise OutputError(
            f"{join_url(canonical_url(folder_url), name)}: cannot be removed: {error}"
        ) from error


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
    stale = [
        path
        for path in Path(folder).glob(f"{TEMPORARY_PREFIX}*")
        if path.stat().st_mtime < now_s - older_than_s
    ]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)
