"""Names of files: shards and their ids, URLs as they may be written down, errors without secrets."""

from __future__ import annotations

import hashlib
import posixpath
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

import pyarrow as pa

from pipeline.errors import PipelineError
from pipeline.records import printable
from pipeline.storage.commands import COMMAND_PREFIX, is_command, named_shard

OBJECT_SCHEMES = ("s3", "gs", "gcs")
WEB_SCHEMES = ("http", "https")


@dataclass(frozen=True)
class ShardSource:
    """One input tar.

    Attributes:
        shard_id: names the output files: the stem, reduced to [A-Za-z0-9._-], and a digest of the URL.
        url: what is opened; may carry a signature, so it is never written down, nor shown in a log.
        canonical_url: absolute, without user info and query.
        size_bytes: size of the object; None where the server does not tell.
        mtime_ns: when it was last changed, in nanoseconds since the epoch; None where that is not told.
        etag: what the store calls this version of the object; None where it does not tell.
    """

    shard_id: str
    url: str = field(repr=False)
    canonical_url: str
    size_bytes: int | None
    mtime_ns: int | None = None
    etag: str | None = None


def split_url(url: str) -> SplitResult:
    """Like urlsplit, but ``#`` in an object's key is part of it, and so is a ``?`` that no option follows."""
    parts = urlsplit(url)
    if parts.scheme not in OBJECT_SCHEMES:
        return parts
    location, *query = re.split(r"\?(?=[A-Za-z][\w-]*=)", url[len(parts.scheme) + 3 :], maxsplit=1)
    authority, slash, key = location.partition("/")
    return SplitResult(parts.scheme, authority, slash + key, "".join(query), "")


def host_of(parts: SplitResult) -> str:
    """The host or bucket, without user info."""
    return parts.netloc.rpartition("@")[2]


def local_path(url: str) -> Path:
    """The absolute path that a path or a ``file://`` URL names."""
    is_url = url.startswith("file://")
    return Path(unquote(urlsplit(url).path) if is_url else url).absolute()


def absolute(url: str) -> str:
    """A path that means the same file whatever the working directory; URLs stay as they are."""
    return str(local_path(url)) if split_url(url).scheme in ("", "file") else url


def canonical_url(url: str) -> str:
    """The absolute URL of a file without user info, query and fragment.

    Local paths become ``file://`` URLs. For a command it is ``pipe:`` and the URL of the tar that it names.
    """
    if is_command(url):
        return COMMAND_PREFIX + shlex.quote(canonical_url(named_shard(url)))
    parts = split_url(url)
    if parts.scheme in ("", "file"):
        return local_path(url).as_uri()
    return urlunsplit((parts.scheme, host_of(parts), parts.path, "", ""))


def shown_url(pattern: str) -> str:
    """A path or URL pattern as it may be written down: user info, query and fragment removed from URLs."""
    is_remote = urlsplit(pattern).scheme in (*OBJECT_SCHEMES, *WEB_SCHEMES)
    return canonical_url(pattern) if is_remote or is_command(pattern) else pattern


def shard_id(url: str) -> str:
    """The name of a shard's output files: reduced stem, dash, 8 hexadecimal digits of the URL's digest."""
    canonical = canonical_url(url)
    stem = posixpath.splitext(posixpath.basename(unquote(split_url(canonical).path)))[0]
    reduced = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:80] or "shard"
    return f"{reduced}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def join_url(folder_url: str, *names: str) -> str:
    """The URL of something in a folder; options of an object store's URL stay at its end."""
    query = split_url(folder_url).query if urlsplit(folder_url).scheme in OBJECT_SCHEMES else ""
    options = f"?{query}" if query else ""
    return posixpath.join(folder_url.removesuffix(options), *names) + options


def without_secrets(error: Exception, url: str) -> str:
    """What an error says, in one line, with whatever of the URL must not be written down taken out."""
    parts = split_url(url)
    text = printable(" ".join(str(error).split()))
    if parts.scheme not in (*OBJECT_SCHEMES, *WEB_SCHEMES):
        return text
    text = text.replace(url, canonical_url(url))
    user_info = parts.netloc.rpartition("@")[0]
    for secret in filter(None, (user_info, user_info.partition(":")[2], parts.query)):
        text = text.replace(secret, "***")
    return text


@contextmanager
def told_as(kind: type[PipelineError], url: str, what: str) -> Iterator[None]:
    """Turn errors of files and connections into one of ours that names the file and shows no secret."""
    try:
        yield
    except (OSError, HTTPException, pa.ArrowException) as error:
        # the cause itself would show its secrets in a traceback
        raise kind(f"{canonical_url(url)}: {what}: {without_secrets(error, url)}") from None
