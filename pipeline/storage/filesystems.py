"""Filesystems for paths and object URLs, with timeouts and retries that suit long jobs."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from functools import lru_cache
from urllib.parse import SplitResult, parse_qsl, unquote

import pyarrow.fs as pafs

from pipeline.errors import UserError
from pipeline.storage.urls import (
    OBJECT_SCHEMES,
    host_of,
    is_local,
    local_path,
    raised_as,
    short_url,
    shown_url,
    split_url,
)

CONNECT_TIMEOUT_S = 10
# pyarrow's own default is none: a read would wait for ever for a server that falls silent
SILENCE_TIMEOUT_S = 60
# the wait before the n-th retry is random, below 2^(n-1) s and 20 s: about half a minute in all
S3_ATTEMPTS = 8
GCS_RETRY_TIME = timedelta(minutes=2)
# for requests that are repeated here as well: a silent store costs one of them a minute at most
BRIEF_SILENCE_TIMEOUT_S = 30
BRIEF_S3_ATTEMPTS = 2
BRIEF_GCS_RETRY_TIME = timedelta(seconds=20)
S3_OPTIONS = ("region", "scheme", "endpoint_override")
GCS_OPTIONS = ("scheme", "endpoint_override")
ANONYMOUS = "anonymous"


def resolve(url: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a path or object URL, and the path in it.

    Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
    GOOGLE_APPLICATION_CREDENTIALS, ...). Requests that an object store throttles, or whose connection breaks,
    are repeated after a growing random wait, up to AWS_MAX_ATTEMPTS times.

    Raises:
        UserError: the scheme is not one of local, s3 and gs, the URL's options are wrong, or its bucket's
            region cannot be found.
    """
    with raised_as(UserError, url, "cannot be used"):
        return resolved(url)


def resolved(url: str, *, brief: bool = False) -> tuple[pafs.FileSystem, str]:
    """Do what `resolve` does, but raise an OSError if a store does not answer.

    Args:
        url: local path, s3 or gs.
        brief: whether the filesystem gives up soon, because the caller repeats what fails.
    """
    check_folder(url)
    if is_local(url):
        return pafs.LocalFileSystem(), str(local_path(url))
    parts = split_url(url)
    root = parts._replace(path="", fragment="")
    return _object_filesystem(root, brief), f"{host_of(parts)}{parts.path}"


def check_folder(url: str) -> None:
    """Check that a URL can be that of a folder for reading and writing, without a request.

    Raises:
        UserError: it is neither a local path nor on an object store.
    """
    if is_local(url):
        _check_utf8(str(local_path(url)))
        return
    parts = split_url(url)
    if parts.scheme not in OBJECT_SCHEMES:
        expected = "a local path, s3:// or gs:// (http:// only for input)"
        raise UserError(f"{short_url(url)}: expected {expected}, got the scheme {parts.scheme or 'pipe'!r}")
    if not host_of(parts):
        raise UserError(f"{short_url(url)}: expected a bucket after ://, got none")
    if ":" in host_of(parts):
        # the bucket is the beginning of a key with a slash in it, and would be shown
        raise UserError(
            f"{short_url(url)}: expected a bucket after ://, got a name with a colon; write a slash in a "
            "secret key as %2F"
        )


def _check_utf8(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{short_url(path)}: expected a path in UTF-8; rename the folder") from None


@lru_cache(maxsize=64)
def _object_filesystem(root: SplitResult, brief: bool) -> pafs.FileSystem:
    return _s3(root, brief) if root.scheme == "s3" else _gcs(root, brief)


def forget_filesystems() -> None:
    """Release the cached filesystems of object stores, and their connections."""
    _object_filesystem.cache_clear()


# registered after pyarrow's own handler and so called before it: no filesystem outlives the AWS SDK
atexit.register(forget_filesystems)


def _s3(root: SplitResult, brief: bool) -> pafs.S3FileSystem:
    options = _options(root, S3_OPTIONS)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options.setdefault("endpoint_override", endpoint)
    if "region" not in options and "endpoint_override" not in options:
        options["region"] = pafs.resolve_s3_region(host_of(root))
    if root.username:
        options["access_key"] = unquote(root.username)
        options["secret_key"] = unquote(root.password or "")
    attempts = os.environ.get("AWS_MAX_ATTEMPTS") or str(BRIEF_S3_ATTEMPTS if brief else S3_ATTEMPTS)
    if not attempts.isdecimal():
        raise UserError(f"AWS_MAX_ATTEMPTS: expected a whole number, got {attempts!r}")
    return pafs.S3FileSystem(
        **options,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=BRIEF_SILENCE_TIMEOUT_S if brief else SILENCE_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=int(attempts)),
        # one request for a small file, instead of the three of an upload in parts
        allow_delayed_open=True,
        # without it, closing a stream after a failed write completes the upload with the parts that succeeded
        background_writes=True,
    )


def _gcs(root: SplitResult, brief: bool) -> pafs.GcsFileSystem:
    if root.username not in (None, ANONYMOUS):
        raise UserError(
            f"{short_url(root.geturl())}: credentials come from the environment, never from a URL"
        )
    return pafs.GcsFileSystem(
        **_options(root, GCS_OPTIONS),
        anonymous=root.username == ANONYMOUS,
        retry_time_limit=BRIEF_GCS_RETRY_TIME if brief else GCS_RETRY_TIME,
    )


def _options(root: SplitResult, known: tuple[str, ...]) -> dict[str, str]:
    options = dict(parse_qsl(root.query))
    if unknown := sorted(set(options) - set(known)):
        where = shown_url(root.geturl())
        raise UserError(
            f"{where}: cannot be used: expected options {', '.join(known)}, got {', '.join(unknown)}"
        )
    return options
