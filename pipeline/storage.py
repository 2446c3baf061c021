"""Files wherever they live: naming, listing, reading to the last byte, and publishing in one step."""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, BinaryIO, cast
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

import braceexpand
import pyarrow as pa
import pyarrow.fs as pafs

from pipeline import web
from pipeline.errors import OutputError, PipelineError, ShardError, ShortReadError, UserError

READAHEAD_BYTES = 4 << 20
SIZE_REQUESTS_AT_ONCE = 32
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


def _parts(url: str) -> SplitResult:
    """Like urlsplit, but ``#`` in an object's key is part of it, and so is a ``?`` that no option follows."""
    parts = urlsplit(url)
    if parts.scheme not in OBJECT_SCHEMES:
        return parts
    location, *query = re.split(r"\?(?=[A-Za-z][\w-]*=)", url[len(parts.scheme) + 3 :], maxsplit=1)
    authority, slash, key = location.partition("/")
    return SplitResult(parts.scheme, authority, slash + key, "".join(query), "")


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def canonical_url(url: str) -> str:
    """The absolute URL of a file without user info, query and fragment.

    Local paths become ``file://`` URLs.
    """
    parts = _parts(url)
    if parts.scheme in ("", "file"):
        return _local_path(url).as_uri()
    return urlunsplit((parts.scheme, _host(parts), parts.path, "", ""))


def without_credentials(pattern: str) -> str:
    """A path or URL pattern as it may be written down: user info, query and fragment removed from URLs."""
    is_remote = urlsplit(pattern).scheme in (*OBJECT_SCHEMES, *WEB_SCHEMES)
    return canonical_url(pattern) if is_remote else pattern


def _without_secrets(error: Exception, url: str) -> str:
    """What an error says, in one line, with whatever of the URL must not be written down taken out."""
    parts = _parts(url)
    text = " ".join(str(error).split())
    if parts.scheme not in (*OBJECT_SCHEMES, *WEB_SCHEMES):
        return text
    text = text.replace(url, canonical_url(url))
    user_info = parts.netloc.rpartition("@")[0]
    for secret in filter(None, (user_info, user_info.partition(":")[2], parts.query)):
        text = text.replace(secret, "***")
    return text


@contextmanager
def _told_as(kind: type[PipelineError], url: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, HTTPException, pa.ArrowException) as error:
        # the cause itself would show its secrets in a traceback
        raise kind(f"{canonical_url(url)}: {what}: {_without_secrets(error, url)}") from None


def _local_path(url: str) -> Path:
    is_url = url.startswith("file://")
    return Path(unquote(urlsplit(url).path) if is_url else url).absolute()


def absolute(url: str) -> str:
    """A path that means the same file whatever the working directory; URLs stay as they are."""
    return str(_local_path(url)) if _parts(url).scheme in ("", "file") else url


def shard_id(url: str) -> str:
    """The name of a shard's output files: reduced stem, dash, 8 hexadecimal digits of the URL's digest."""
    canonical = canonical_url(url)
    stem = posixpath.splitext(posixpath.basename(unquote(_parts(canonical).path)))[0]
    reduced = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:80] or "shard"
    return f"{reduced}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def list_shards(patterns: str | list[str]) -> list[ShardSource]:
    """Expand shard patterns to a sorted list without repetitions.

    Args:
        patterns: paths or URLs with braces and globs; ``@FILE`` reads patterns from a text file, one a line.

    Returns:
        The shards, sorted by canonical URL.

    Raises:
        UserError: nothing matches a pattern, the pattern would run a command, or an object store refuses.
    """
    sizes: dict[str, int | None] = {}
    unsized: list[str] = []
    for pattern in _spelled_out([patterns] if isinstance(patterns, str) else patterns):
        if not _is_glob(pattern):
            unsized.append(pattern)
        elif matches := _matches(pattern):
            sizes |= matches
        else:
            raise UserError(f"input.shards: nothing matches {canonical_url(pattern)}")
    sizes |= _sizes_bytes(url for url in dict.fromkeys(unsized) if url not in sizes)
    urls = {canonical_url(url): url for url in sizes}
    return [
        ShardSource(shard_id(known), absolute(known_url), known, sizes[known_url])
        for known, known_url in sorted(urls.items())
    ]


def _spelled_out(patterns: list[str]) -> Iterator[str]:
    for pattern in patterns:
        if pattern.startswith("@"):
            yield from _spelled_out(_lines(pattern[1:]))
        elif pattern.startswith(COMMAND_PREFIX):
            raise UserError(f"input.shards: {pattern.split()[0]!r} would run a command; give a path or a URL")
        else:
            _check_is_url(pattern)
            yield from braceexpand.braceexpand(pattern)


def _check_is_url(pattern: str) -> None:
    try:
        urlsplit(pattern)
    except ValueError as error:
        raise UserError(f"input.shards: expected a path or a URL: {error}") from None


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"input.shards: the list {path} cannot be read: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _is_glob(pattern: str) -> bool:
    parts = _parts(pattern)
    where = _host(parts) + parts.path if parts.scheme in OBJECT_SCHEMES else pattern
    return parts.scheme not in WEB_SCHEMES and any(character in where for character in "*?[")


def _matches(pattern: str) -> dict[str, int]:
    """URLs and sizes of the files that match a glob, by one listing of the folder above it."""
    filesystem, path = resolve(pattern)
    folder, slash, below = _cut_before_glob(path)
    if not slash:
        raise UserError(f"input.shards: {canonical_url(pattern)}: expected the bucket's name, got a glob")
    selector = pafs.FileSelector(folder or "/", recursive="/" in below, allow_not_found=True)
    glob = re.compile(_glob_regex(path))
    with _told_as(UserError, pattern, "cannot be listed"):
        infos = filesystem.get_file_info(selector)
    return {
        _url_like(pattern, info.path): info.size
        for info in infos
        if info.is_file and glob.fullmatch(info.path)
    }


def _cut_before_glob(path: str) -> tuple[str, str, str]:
    literal = re.split(r"[*?\[]", path, maxsplit=1)[0]
    folder, slash, _ = literal.rpartition("/")
    return folder, slash, path[len(folder) + 1 :]


def _glob_regex(glob: str) -> str:
    tokens = re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", glob)
    known = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(token)
        or (token.replace("[!", "[^", 1) if re.fullmatch(r"\[[^\]]+\]", token) else re.escape(token))
        for token in tokens
    )


def _url_like(pattern: str, path: str) -> str:
    """The URL of a path found by a pattern, with the pattern's user info and options."""
    parts = _parts(pattern)
    if parts.scheme not in OBJECT_SCHEMES:
        return path
    key = path.partition("/")[2]
    return f"{parts.scheme}://{parts.netloc}/{key}" + (f"?{parts.query}" if parts.query else "")


def _sizes_bytes(urls: Iterable[str]) -> Mapping[str, int | None]:
    listed = list(urls)
    with ThreadPoolExecutor(SIZE_REQUESTS_AT_ONCE) as pool:
        sizes = dict(zip(listed, pool.map(_size_bytes, listed), strict=True))
    _check_buckets(url for url, size in sizes.items() if size is None)
    return sizes


def _size_bytes(url: str) -> int | None:
    scheme = _parts(url).scheme
    if scheme in WEB_SCHEMES:
        return web.size_bytes(url)
    filesystem, path = resolve(url)
    if scheme in OBJECT_SCHEMES:
        with _told_as(UserError, url, "cannot be looked up"):
            return cast("int | None", filesystem.get_file_info(path).size)
    try:
        return cast("int | None", filesystem.get_file_info(path).size)
    except OSError:
        return None


def _check_buckets(urls: Iterable[str]) -> None:
    """Tell a missing bucket, of which no object can be read, from a missing object."""
    objects = [url for url in urls if _parts(url).scheme in OBJECT_SCHEMES]
    for url in {_parts(url).netloc: url for url in objects}.values():
        filesystem, path = resolve(url)
        bucket = path.partition("/")[0]
        with _told_as(UserError, url, "its bucket cannot be looked up"):
            if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
                raise UserError(f"{canonical_url(url)}: there is no bucket {bucket!r}")


def resolve(url: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem that serves a path or object URL, and the path within it.

    Endpoint and credentials of S3 come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).

    Raises:
        UserError: the scheme is not one of local, s3 and gs, the URL's options are wrong, or its bucket's
            region cannot be found.
    """
    with _told_as(UserError, url, "cannot be used"):
        return _resolved(url)


def _resolved(url: str) -> tuple[pafs.FileSystem, str]:
    parts = _parts(url)
    if parts.scheme in ("", "file"):
        return pafs.LocalFileSystem(), str(_local_path(url))
    if parts.scheme in OBJECT_SCHEMES:
        query = f"?{parts.query}" if parts.query else ""
        filesystem = _object_filesystem(f"{parts.scheme}://{parts.netloc}/{query}")
        return filesystem, f"{_host(parts)}{parts.path}"
    expected = "a local path, s3:// or gs:// (http:// only for input)"
    raise UserError(f"{canonical_url(url)}: expected {expected}, got scheme {parts.scheme!r}")


@lru_cache(maxsize=64)
def _object_filesystem(root_url: str) -> pafs.FileSystem:
    filesystem, _ = pafs.FileSystem.from_uri(root_url)
    return filesystem


class _CountedStream(io.RawIOBase):
    """Passes bytes on and tells a connection that ended early from the end of the object."""

    def __init__(self, stream: Any, shard: ShardSource, announced_bytes: int) -> None:
        self._stream = stream
        self._shard = shard
        self._announced_bytes = announced_bytes
        self._read_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _told_as(ShardError, self._shard.url, f"cannot be read on from byte {self._read_bytes}"):
            data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._read_bytes += len(data)
        if not data and self._read_bytes < self._announced_bytes:
            raise ShortReadError(
                f"{self._shard.canonical_url}: only {self._read_bytes} of {self._announced_bytes} bytes came"
            )
        return len(data)


@contextmanager
def open_shard(shard: ShardSource) -> Iterator[BinaryIO]:
    """Stream a shard from its first byte.

    Raises:
        ShardError: it cannot be opened or read.
        ShortReadError: fewer bytes come than the object holds.
    """
    with _told_as(ShardError, shard.url, "cannot be opened"):
        stream, announced_bytes = _opened(shard)
    with stream:
        yield io.BufferedReader(_CountedStream(stream, shard, announced_bytes), READAHEAD_BYTES)


def _opened(shard: ShardSource) -> tuple[Any, int]:
    """A stream, and how many bytes are known to come at least."""
    listed_bytes = shard.size_bytes or 0
    if _parts(shard.url).scheme in WEB_SCHEMES:
        response = web.open_url(shard.url)
        return response, max(listed_bytes, response.length or 0)
    filesystem, path = _resolved(shard.url)
    return filesystem.open_input_stream(path, buffer_size=READAHEAD_BYTES), listed_bytes


def read_bytes(url: str) -> bytes:
    """The whole content of a small file; raises FileNotFoundError or another OSError."""
    filesystem, path = resolve(url)
    with filesystem.open_input_stream(path) as stream:
        return cast(bytes, stream.read())


def list_names(folder_url: str) -> set[str]:
    """Names of the files directly in a folder, temporary ones left out; a missing folder has none.

    Raises:
        OutputError: the folder cannot be listed.
    """
    with _told_as(OutputError, folder_url, "cannot be listed"):
        filesystem, path = _resolved(folder_url)
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return {
        info.base_name for info in infos if info.is_file and not info.base_name.startswith(TEMPORARY_PREFIX)
    }


def join_url(folder_url: str, *names: str) -> str:
    """The URL of something in a folder; options of an object store's URL stay at its end."""
    query = _parts(folder_url).query if urlsplit(folder_url).scheme in OBJECT_SCHEMES else ""
    options = f"?{query}" if query else ""
    return posixpath.join(folder_url.removesuffix(options), *names) + options


def publish(folder_url: str, name: str, content: IO[bytes] | bytes) -> None:
    """Make a file appear under its final name whole, or not at all; replaces an earlier one.

    Local: a temporary file in the same folder, fsync, rename. Object stores: one completed upload.

    Raises:
        OutputError: it cannot be written; the path and the cause are in the message.
    """
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    stream.seek(0)
    with _told_as(OutputError, join_url(folder_url, name), "cannot be written"):
        filesystem, folder = _resolved(folder_url)
        if isinstance(filesystem, pafs.LocalFileSystem):
            _publish_local(Path(folder), name, stream)
        else:
            _publish_object(filesystem, posixpath.join(folder, name), stream.read())


def _publish_object(filesystem: pafs.FileSystem, path: str, content: bytes) -> None:
    """Upload whole, or not at all.

    Closing or dropping pyarrow's stream publishes whatever was written, even after an exception. So the
    content is complete before the stream is opened, and is written by a thread, where no Ctrl-C arrives.
    """

    def upload() -> None:
        with filesystem.open_output_stream(path) as sink:
            sink.write(content)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(upload).result()


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
    """Whether a file of that name is there; raises OutputError where that cannot be told."""
    with _told_as(OutputError, join_url(folder_url, name), "cannot be looked up"):
        filesystem, folder = _resolved(folder_url)
        return bool(filesystem.get_file_info(posixpath.join(folder, name)).is_file)


def remove(folder_url: str, name: str) -> None:
    """Delete a file if it is there; raises OutputError where that is not allowed."""
    with _told_as(OutputError, join_url(folder_url, name), "cannot be removed"):
        filesystem, folder = _resolved(folder_url)
        path = posixpath.join(folder, name)
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
