"""Repeat requests that fail for a passing reason: one policy for web servers, object stores and folders."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import TypeVar

import pyarrow.fs as pafs
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)
from tenacity.stop import stop_base

from pipeline.storage.filesystems import resolved
from pipeline.storage.urls import is_local

ATTEMPTS = 6
LONGEST_WAIT_S = 60.0
# of a request to an object store or a folder, with all its attempts
TOTAL_S = 60.0
LOCAL_ATTEMPTS = 3
# errors of network file systems: a server is restarted, a handle has expired, a signal arrives
PASSING_LOCAL_ERRORS = (errno.EINTR, errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT)
# What an object store's errors say when no later attempt can succeed. Everything else may pass: to repeat a
# request in vain costs a minute, to give up too soon costs the job.
_LASTING_STORE_ERRORS = re.compile(
    # 408: request timeout; 429: too many requests; 507: the store is full
    r"HTTP status (?:4(?!08|29)\d\d|507)"
    r"|[Bb]ucket '[^']*' not found"
    r"|AWS Error (?:ACCESS_DENIED|INVALID_\w+|MISSING_\w+|NO_SUCH_\w+|RESOURCE_NOT_FOUND|MALFORMED_\w+"
    r"|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT|OPT_IN_REQUIRED|REQUEST_EXPIRED|VALIDATION"
    r"|BUCKET_\w+|OBJECT_NOT_\w+|OBJECT_ALREADY_\w+|INCOMPLETE_SIGNATURE|NOT_IMPLEMENTED)\b"
    r"|\b(?:PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|INVALID_ARGUMENT|FAILED_PRECONDITION|OUT_OF_RANGE"
    r"|ALREADY_EXISTS|UNIMPLEMENTED): "
)

Result = TypeVar("Result")


def retrying(
    may_pass: Callable[[BaseException], bool],
    *,
    attempts: int,
    stop: stop_base,
    asked_wait_s: Callable[[BaseException], float] = lambda _: 0.0,
) -> Retrying:
    """Return a caller that repeats a function after waits that grow and are random.

    Args:
        may_pass: whether another attempt may succeed after an exception.
        attempts: most attempts.
        stop: what else ends them.
        asked_wait_s: the seconds for which a server asks after an exception; the wait is at least as long.
    """

    def wait_s(state: RetryCallState) -> float:
        own_s = float(wait_random_exponential(max=LONGEST_WAIT_S)(state))
        error = state.outcome.exception() if state.outcome is not None else None
        return own_s if error is None else max(own_s, min(asked_wait_s(error), LONGEST_WAIT_S))

    return Retrying(
        stop=stop_after_attempt(attempts) | stop,
        wait=wait_s,
        retry=retry_if_exception(may_pass),
        reraise=True,
    )


def request(url: str, work: Callable[[pafs.FileSystem, str], Result]) -> Result:
    """Do something with a path or object URL; repeat it while it fails for a passing reason.

    Args:
        url: local path, s3 or gs.
        work: takes the filesystem and the path in it; it must be right to call it again after a failure.

    Raises:
        OSError: the last failure.
        UserError: the URL cannot be used.
    """

    def attempt() -> Result:
        return work(*resolved(url, brief=True))

    local = is_local(url)
    return retrying(
        _local_error_may_pass if local else store_error_may_pass,
        attempts=LOCAL_ATTEMPTS if local else ATTEMPTS,
        stop=stop_before_delay(TOTAL_S),
    )(attempt)


def _local_error_may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in PASSING_LOCAL_ERRORS


def store_error_may_pass(error: BaseException) -> bool:
    """Return whether a request to an object store may succeed later, by what its error says."""
    lasting = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
    if not isinstance(error, OSError) or isinstance(error, lasting):
        return False
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return False
    return not _LASTING_STORE_ERRORS.search(str(error))
