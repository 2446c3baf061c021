"""Objects on web servers: read as they come, and read on where a connection was cut."""

from __future__ import annotations

import base64
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse, IncompleteRead
from types import TracebackType
from typing import cast
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

SILENCE_TIMEOUT_S = 60.0
SIZE_TIMEOUT_S = 20.0
ATTEMPTS = 6
LONGEST_WAIT_S = 60.0
THROTTLED_OR_DOWN = (408, 429, 500, 502, 503, 504)
RESERVED = "%/:?#[]@!$&'()*+,;=~"


class WebObject:
    """The bytes of an object, in order; requests that fail for the moment are repeated.

    A cut connection is taken up again from the byte it was cut at, where the server tells that the object is
    still the same (an ETag or a date). Waits between attempts grow, are random, and are no shorter than what
    the server asks for.

    Args:
        url: http or https; user info becomes basic authentication.

    Attributes:
        announced_bytes: the object's size as the server announces it; None where it does not.
        tells_its_end: whether the end can be told from a cut connection: by the size, or by the last chunk.

    Raises:
        OSError, http.client.HTTPException: the server refuses, or cannot be reached for long.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._read_bytes = 0
        self._response: HTTPResponse | None = _retrying()(_answer, url, "GET", SILENCE_TIMEOUT_S)
        self.announced_bytes = self._response.length
        self.tells_its_end = self.announced_bytes is not None or self._response.chunked
        self._validator = _validator(self._response)

    def __enter__(self) -> WebObject:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end of the object.

        Raises:
            OSError, http.client.HTTPException: the connection was cut, and could not be taken up again.
        """
        if self._validator is None:
            return self._read_once(size)
        return _retrying()(self._read_once, size)

    def _read_once(self, size: int) -> bytes:
        if self._response is None:
            self._response = self._taken_up_again(self._validator or "")
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

    def _taken_up_again(self, validator: str) -> HTTPResponse:
        wanted = {"Range": f"bytes={self._read_bytes}-", "If-Range": validator}
        response = _answer(self._url, "GET", SILENCE_TIMEOUT_S, wanted)
        sent = response.headers.get("Content-Range", "")
        if response.status == 206 and sent.startswith(f"bytes {self._read_bytes}-"):
            return response
        response.close()
        raise OSError(f"cut at byte {self._read_bytes}, and the server does not send what follows")

    def close(self) -> None:
        """Hang up."""
        if self._response is not None:
            self._response.close()
            self._response = None


def size_bytes(url: str) -> int | None:
    """Size of an object as the server announces it without sending it; None where it does not."""
    try:
        with _answer(url, "HEAD", SIZE_TIMEOUT_S) as response:
            return int(response.headers["Content-Length"])
    except (OSError, HTTPException, TypeError, ValueError):
        return None


def _validator(response: HTTPResponse) -> str | None:
    """What tells one version of the object from the next; a weak ETag does not do it byte for byte."""
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
        # not sent on to where a redirect leads
        request.add_unredirected_header("Authorization", f"Basic {token}")
    try:
        return cast(HTTPResponse, urllib.request.urlopen(request, timeout=timeout_s))  # noqa: S310
    except HTTPError as error:
        error.close()  # it holds the connection
        raise


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
    return isinstance(error, (URLError, HTTPException, ConnectionError, TimeoutError))


def _wait_s(state: RetryCallState) -> float:
    own_s = float(wait_random_exponential(max=LONGEST_WAIT_S)(state))
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.headers.get("Retry-After", "") if isinstance(error, HTTPError) else ""
    return max(own_s, min(float(asked), LONGEST_WAIT_S)) if asked.isdigit() else own_s
