"""Read objects from web servers, and resume where a connection was cut."""

from __future__ import annotations

import base64
import hashlib
import re
import urllib.request
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, IncompleteRead, InvalidURL
from types import TracebackType
from typing import cast
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from tenacity import RetryCallState, Retrying
from tenacity.stop import stop_base

from pipeline.storage.attempts import ATTEMPTS, retrying
from pipeline.storage.connections import Pace, opener
from pipeline.storage.limits import ReadLimits, TooSlowError
from pipeline.storage.sources import InputVersion
from pipeline.text import printable

SIZE_TIMEOUT_S = 20.0
# a server that throttles answers, and is asked for longer than one that is silent
THROTTLED_TOTAL_S = 300.0
BLOCK_BYTES = 256 << 10
# after so many bytes, a connection that becomes too slow is replaced once more
PROGRESS_BYTES = 4 << 20
THROTTLED_OR_DOWN = (408, 429, 500, 502, 503, 504)
LONGEST_TAG = 256
DEFAULT_LIMITS = ReadLimits()
RESERVED = "%/:?#[]@!$&'()*+,;=~"

_DIGITS = re.compile("[0-9]{1,18}")


class WebObject:
    """Reads the bytes of an object in order; requests that fail temporarily are repeated.

    After a cut connection, reading resumes at the byte of the cut, if the server confirms by an ETag or a
    date that the object is the same. Waits between attempts grow, are random, and are at least as long as the
    server asks for. A connection that is too slow is replaced once.

    Args:
        url: http or https; user info becomes basic authentication.
        limits: how long it waits for an answer, and the smallest rate allowed.

    Attributes:
        announced_bytes: size of the object as the server announces it; None if it does not.
        has_known_end: whether the end differs from a cut connection: by the size, or by the last chunk.

    Raises:
        OSError, http.client.HTTPException: the server refuses, or cannot be reached for long.
    """

    def __init__(self, url: str, limits: ReadLimits = DEFAULT_LIMITS) -> None:
        self._url = url
        self._limits = limits
        self._read_bytes = 0
        self._was_slow_at_byte: int | None = None
        self._response: HTTPResponse | None = _retrying(limits)(_answer, url, "GET", limits)
        if self._response.status == 206:
            self.close()
            raise OSError("the server sent a part of the file, although the whole was asked for")
        # http.client accepts all that int() accepts
        sent_whole = self._response.length is not None
        self.announced_bytes = _whole_number(self._response.headers["Content-Length"]) if sent_whole else None
        self.has_known_end = self.announced_bytes is not None or self._response.chunked
        self._validator = _validator(self._response)

    def __enter__(self) -> WebObject:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, size: int) -> bytes:
        """Return the next bytes as they arrive, at most `size`; none at the end of the object.

        Raises:
            OSError, http.client.HTTPException: the connection was cut, and reading could not be resumed.
            TooSlowError: bytes arrive too slowly.
        """
        if self._validator is None:
            return self._read_once(size)
        return _retrying(self._limits)(self._read_once, size)

    def _read_once(self, size: int) -> bytes:
        if self._response is None:
            self._response = self._resumed(self._validator or "")
        missing_bytes = None if self.announced_bytes is None else self.announced_bytes - self._read_bytes
        if missing_bytes == 0:
            return b""
        try:
            data = self._response.read1(min(size, BLOCK_BYTES, missing_bytes or BLOCK_BYTES))
            if not data and missing_bytes:
                raise IncompleteRead(b"", missing_bytes)
        except TooSlowError as error:
            self.close()
            if self._is_slow_again():
                raise
            # another connection may be faster
            raise TimeoutError(str(error)) from None
        except (OSError, HTTPException):
            self.close()
            raise
        self._read_bytes += len(data)
        return data

    def _is_slow_again(self) -> bool:
        before, self._was_slow_at_byte = self._was_slow_at_byte, self._read_bytes
        return before is not None and self._read_bytes - before < PROGRESS_BYTES

    def _resumed(self, validator: str) -> HTTPResponse:
        wanted = {"Range": f"bytes={self._read_bytes}-", "If-Range": validator}
        response = _answer(self._url, "GET", self._limits, wanted)
        sent = response.headers.get("Content-Range", "")
        if response.status == 206 and sent.startswith(f"bytes {self._read_bytes}-"):
            return response
        response.close()
        raise OSError(
            f"the connection was cut at byte {self._read_bytes}, and the server does not resume there"
        )

    def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None


def ask(url: str, *, timeout_s: float = SIZE_TIMEOUT_S) -> InputVersion:
    """Ask for an object's size and version by one request; return an empty version if the server refuses.

    Raises:
        TimeoutError: the server has not answered in time.
    """
    try:
        with _answer(url, "HEAD", ReadLimits(answer_timeout_s=timeout_s)) as response:
            headers = response.headers
    except (OSError, HTTPException) as error:
        if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
            raise TimeoutError(f"no answer for {timeout_s:g} s") from None
        return InputVersion()
    return InputVersion(
        _whole_number(headers.get("Content-Length")),
        _time_ns(headers.get("Last-Modified")),
        _tag(headers.get("ETag")),
    )


def _whole_number(text: str | None) -> int | None:
    """Parse ASCII digits of at most 64 bits; int() also accepts signs, underscores and other digits."""
    return int(text) if text is not None and _DIGITS.fullmatch(text.strip(" \t")) else None


def _time_ns(text: str | None) -> int | None:
    try:
        seconds = parsedate_to_datetime(text or "").timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    time_ns = round(seconds) * 10**9
    return time_ns if 0 <= time_ns < 2**63 else None


def _tag(text: str | None) -> str | None:
    """Return the ETag as it may be stored: a server may send anything."""
    if not text:
        return None
    tag = printable(text)
    return tag if len(tag) <= LONGEST_TAG else f"sha256:{hashlib.sha256(tag.encode()).hexdigest()}"


def _validator(response: HTTPResponse) -> str | None:
    """Return what identifies a version byte for byte, which a weak ETag does not."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _answer(
    url: str, method: str, limits: ReadLimits, headers: Mapping[str, str] | None = None
) -> HTTPResponse:
    """Send a request and return the answer with its headers read, after redirects."""
    pace = Pace(limits)
    parts = urlsplit(url)
    user_info, _, host = parts.netloc.rpartition("@")
    bare_url = quote(urlunsplit((parts.scheme, host, parts.path, parts.query, "")), safe=RESERVED)
    request = urllib.request.Request(bare_url, headers=dict(headers or {}), method=method)  # noqa: S310 (http or https)
    if user_info:
        token = base64.b64encode(unquote(user_info).encode()).decode()
        # not sent to the target of a redirect
        request.add_unredirected_header("Authorization", f"Basic {token}")
    try:
        response = cast(HTTPResponse, opener(pace).open(request, timeout=limits.answer_timeout_s))
    except HTTPError as error:
        error.close()  # it holds the connection
        raise
    except (ValueError, OverflowError) as error:
        # an invalid host or port, perhaps in the target of a redirect
        raise InvalidURL(f"not a valid web address: {error}") from None
    pace.has_answer()
    return response


def _retrying(limits: ReadLimits) -> Retrying:
    return retrying(
        _may_pass, attempts=ATTEMPTS, stop=_StopInTime(limits.total_s), asked_wait_s=_asked_wait_s
    )


class _StopInTime(stop_base):
    """Ends attempts after a time that is longer where the server answers."""

    def __init__(self, total_s: float) -> None:
        self._total_s = total_s

    def __call__(self, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        total_s = THROTTLED_TOTAL_S if isinstance(error, HTTPError) else self._total_s
        return (state.seconds_since_start or 0) >= total_s


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, HTTPError):
        return error.code in THROTTLED_OR_DOWN
    passing = (URLError, HTTPException, ConnectionError, TimeoutError)
    return isinstance(error, passing) and not isinstance(error, InvalidURL)


def _asked_wait_s(error: BaseException) -> float:
    headers = error.headers if isinstance(error, HTTPError) else None
    return float(_whole_number(headers.get("Retry-After")) or 0) if headers else 0.0
