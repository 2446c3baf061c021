"""Connections to web servers whose waits end in time, and whose answers take bounded memory."""

from __future__ import annotations

import io
import socket
import ssl
import time
import urllib.request
from functools import lru_cache, partial
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import IO, Any, cast

from pipeline.storage.limits import SHORTEST_WAIT_S, RateMeter, ReadLimits

# of interim responses, headers or trailers
MAX_LINES_IN_A_ROW = 1000


class Pace:
    """Limits the waits of a connection: for the whole of an answer's headers, then by the rate of its body.

    Args:
        limits: the limits; the time for the answer begins now.
    """

    def __init__(self, limits: ReadLimits) -> None:
        self._limits = limits
        self._answer_by_s = time.monotonic() + limits.answer_timeout_s
        self._body: RateMeter | None = None

    def has_answer(self) -> None:
        """Measure the rate from here on."""
        self._body = RateMeter(self._limits)

    def patience_s(self) -> float:
        """Return the number of seconds after which waiting for the next byte is too long."""
        if self._body is None:
            return max(SHORTEST_WAIT_S, self._answer_by_s - time.monotonic())
        return self._body.patience_s if self._limits.min_bytes_per_s else self._limits.window_s

    def too_late(self) -> OSError:
        """Return the error for a reader that has waited so long."""
        if self._body is None:
            return TimeoutError(f"no answer for {self._limits.answer_timeout_s:g} s")
        return self._body.too_slow()

    def add(self, waited_s: float, received_bytes: int) -> None:
        """Count bytes that have arrived after a wait; raises TooSlowError if they are too few."""
        if self._body is not None:
            self._body.add(waited_s, received_bytes)


class _PacedStream(io.RawIOBase):
    """Passes the bytes of a connection on; each wait for some ends in time."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket, pace: Pace) -> None:
        self._raw = raw
        self._connection = connection
        self._pace = pace

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        started_s = time.monotonic()
        self._connection.settimeout(self._pace.patience_s())
        try:
            received_bytes = cast(int | None, self._raw.readinto(buffer))
        except TimeoutError:
            raise self._pace.too_late() from None
        self._pace.add(time.monotonic() - started_s, received_bytes or 0)
        return received_bytes

    def close(self) -> None:
        self._raw.close()
        super().close()


class _ResponseStream(io.BufferedReader):
    """The bytes of a response, which http.client reads without limits if the server sends it to do so."""

    _lines_in_a_row = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes; refuse to read to the end, which a chunk of the size -1 would cause."""
        if size is None or size < 0:
            raise OSError("the server sent a chunk of a negative size")
        self._lines_in_a_row = 0
        return super().read(size)

    def read1(self, size: int = -1, /) -> bytes:
        """Return the bytes that have arrived; refuse the size that a chunk of a negative size would cause."""
        if size < 0:
            raise OSError("the server sent a chunk of a negative size")
        self._lines_in_a_row = 0
        return super().read1(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Return the next line; refuse headers or trailers without end."""
        self._lines_in_a_row += 1
        if self._lines_in_a_row > MAX_LINES_IN_A_ROW:
            raise OSError(f"the server sent more than {MAX_LINES_IN_A_ROW:,} lines of headers")
        return super().readline(size)


class _BoundedResponse(HTTPResponse):
    def __init__(self, connection: socket.socket, *args: Any, pace: Pace, **options: Any) -> None:
        super().__init__(connection, *args, **options)
        self.fp = _ResponseStream(_PacedStream(self.fp.detach(), connection, pace))


class _Connection(HTTPConnection):
    def __init__(self, *args: Any, pace: Pace, **options: Any) -> None:
        super().__init__(*args, **options)
        self.response_class = cast(Any, partial(_BoundedResponse, pace=pace))


class _SecureConnection(HTTPSConnection):
    def __init__(self, *args: Any, pace: Pace, **options: Any) -> None:
        super().__init__(*args, **options)
        self.response_class = cast(Any, partial(_BoundedResponse, pace=pace))


class _WebHandler(urllib.request.HTTPHandler):
    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_Connection, pace=self._pace), request)


class _SecureWebHandler(urllib.request.HTTPSHandler):
    def __init__(self, pace: Pace) -> None:
        super().__init__(context=_tls())
        self._pace = pace

    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_SecureConnection, context=_tls(), pace=self._pace), request)


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """Return the settings of encrypted connections; to read the certificates takes long."""
    return ssl.create_default_context()


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, request: urllib.request.Request, response: IO[bytes], *details: Any
    ) -> urllib.request.Request | None:
        # urllib would read the body into memory, whatever its size
        response.close()
        return super().redirect_request(request, response, *details)


def opener(pace: Pace) -> urllib.request.OpenerDirector:
    """Return an opener for http and https only: by default urllib follows redirects to FTP as well."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        _WebHandler(pace),
        _SecureWebHandler(pace),
        urllib.request.HTTPDefaultErrorHandler(),
        _RedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
