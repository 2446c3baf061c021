"""Read objects from web servers, and resume where a connection was cut."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import urllib.request
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http.client import (
    HTTPConnection,
    HTTPException,
    HTTPResponse,
    HTTPSConnection,
    IncompleteRead,
    InvalidURL,
)
from types import TracebackType
from typing import IO, Any, cast
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from pipeline.storage.sources import InputVersion
from pipeline.text import printable

SILENCE_TIMEOUT_S = 60.0
SIZE_TIMEOUT_S = 20.0
ATTEMPTS = 6
LONGEST_WAIT_S = 60.0
THROTTLED_OR_DOWN = (408, 429, 500, 502, 503, 504)
LONGEST_TAG = 256
# of interim responses, headers or trailers
MAX_LINES_IN_A_ROW = 1000
RESERVED = "%/:?#[]@!$&'()*+,;=~"

_DIGITS = re.compile("[0-9]{1,18}")


class WebObject:
    """Reads the bytes of an object in order; requests that fail temporarily are repeated.

    After a cut connection, reading resumes at the byte of the cut, if the server confirms by an ETag or a
    date that the object is the same. Waits between attempts grow, are random, and are at least as long as the
    server asks for.

    Args:
        url: http or https; user info becomes basic authentication.

    Attributes:
        announced_bytes: size of the object as the server announces it; None if it does not.
        has_known_end: whether the end differs from a cut connection: by the size, or by the last chunk.

    Raises:
        OSError, http.client.HTTPException: the server refuses, or cannot be reached for long.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._read_bytes = 0
        self._response: HTTPResponse | None = _retrying()(_answer, url, "GET", SILENCE_TIMEOUT_S)
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
        """Return the next bytes, at most `size`; none at the end of the object.

        Raises:
            OSError, http.client.HTTPException: the connection was cut, and reading could not be resumed.
        """
        if self._validator is None:
            return self._read_once(size)
        return _retrying()(self._read_once, size)

    def _read_once(self, size: int) -> bytes:
        if self._response is None:
            self._response = self._resumed(self._validator or "")
        try:
            data = self._response.read(size)
            missing_bytes = (self.announced_bytes or 0) - self._read_bytes
            if not data and missing_bytes > 0:
                raise IncompleteRead(b"", missing_bytes)
        except (OSError, HTTPException):
            self.close()
            raise
        self._read_bytes += len(data)
        return data

    def _resumed(self, validator: str) -> HTTPResponse:
        wanted = {"Range": f"bytes={self._read_bytes}-", "If-Range": validator}
        response = _answer(self._url, "GET", SILENCE_TIMEOUT_S, wanted)
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


def ask(url: str) -> InputVersion:
    """Ask for an object's size and version by one request; return an empty version if the server refuses."""
    try:
        with _answer(url, "HEAD", SIZE_TIMEOUT_S) as response:
            headers = response.headers
    except (OSError, HTTPException):
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
    url: str, method: str, timeout_s: float, headers: Mapping[str, str] | None = None
) -> HTTPResponse:
    parts = urlsplit(url)
    user_info, _, host = parts.netloc.rpartition("@")
    bare_url = quote(urlunsplit((parts.scheme, host, parts.path, parts.query, "")), safe=RESERVED)
    request = urllib.request.Request(bare_url, headers=dict(headers or {}), method=method)  # noqa: S310 (http or https)
    if user_info:
        token = base64.b64encode(unquote(user_info).encode()).decode()
        # not sent to the target of a redirect
        request.add_unredirected_header("Authorization", f"Basic {token}")
    try:
        return cast(HTTPResponse, _opener().open(request, timeout=timeout_s))
    except HTTPError as error:
        error.close()  # it holds the connection
        raise
    except (ValueError, OverflowError) as error:
        # an invalid host or port, perhaps in the target of a redirect
        raise InvalidURL(f"not a valid web address: {error}") from None


class _ResponseStream(io.BufferedReader):
    """The bytes of a response, which http.client reads without limits if the server sends it to do so."""

    _lines_in_a_row = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes; refuse to read to the end, which a chunk of the size -1 would cause."""
        if size is None or size < 0:
            raise OSError("the server sent a chunk of a negative size")
        self._lines_in_a_row = 0
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Return the next line; refuse headers or trailers without end."""
        self._lines_in_a_row += 1
        if self._lines_in_a_row > MAX_LINES_IN_A_ROW:
            raise OSError(f"the server sent more than {MAX_LINES_IN_A_ROW:,} lines of headers")
        return super().readline(size)


class _BoundedResponse(HTTPResponse):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fp = _ResponseStream(self.fp.detach())


class _Connection(HTTPConnection):
    response_class = _BoundedResponse


class _SecureConnection(HTTPSConnection):
    response_class = _BoundedResponse


class _WebHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_Connection, request)


class _SecureWebHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, request)


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, request: urllib.request.Request, response: IO[bytes], *details: Any
    ) -> urllib.request.Request | None:
        # urllib would read the body into memory, whatever its size
        response.close()
        return super().redirect_request(request, response, *details)


@lru_cache(maxsize=1)
def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for http and https only: by default urllib follows redirects to FTP as well."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        _WebHandler,
        _SecureWebHandler,
        urllib.request.HTTPDefaultErrorHandler,
        _RedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _retrying() -> Retrying:
    return Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=_wait_s,
        retry=retry_if_exception(_may_pass),
        reraise=True,
    )


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, HTTPError):
        return error.code in THROTTLED_OR_DOWN
    passing = (URLError, HTTPException, ConnectionError, TimeoutError)
    return isinstance(error, passing) and not isinstance(error, InvalidURL)


def _wait_s(state: RetryCallState) -> float:
    own_s = float(wait_random_exponential(max=LONGEST_WAIT_S)(state))
    error = state.outcome.exception() if state.outcome is not None else None
    headers = error.headers if isinstance(error, HTTPError) else None
    asked_s = _whole_number(headers.get("Retry-After")) if headers else None
    return own_s if asked_s is None else max(own_s, min(float(asked_s), LONGEST_WAIT_S))
