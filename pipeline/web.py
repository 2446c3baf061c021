"""Shards on web servers: one request a shard, read as it comes."""

from __future__ import annotations

import base64
import urllib.request
from http.client import HTTPException, HTTPResponse
from typing import cast
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit, urlunsplit

SILENCE_TIMEOUT_S = 60.0
SIZE_TIMEOUT_S = 20.0
RESERVED = "%/:?#[]@!$&'()*+,;=~"


def open_url(url: str) -> HTTPResponse:
    """Ask for a whole object; its ``length`` is what the server announces, None where it does not.

    Args:
        url: http or https; user info becomes basic authentication.

    Raises:
        OSError, http.client.HTTPException: the server refuses or cannot be reached.
    """
    return _answer(url, "GET", SILENCE_TIMEOUT_S)


def size_bytes(url: str) -> int | None:
    """Size of an object as the server announces it without sending it; None where it does not."""
    try:
        with _answer(url, "HEAD", SIZE_TIMEOUT_S) as response:
            return int(response.headers["Content-Length"])
    except (OSError, HTTPException, TypeError, ValueError):
        return None


def _answer(url: str, method: str, timeout_s: float) -> HTTPResponse:
    parts = urlsplit(url)
    user_info, _, host = parts.netloc.rpartition("@")
    bare_url = urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
    request = urllib.request.Request(quote(bare_url, safe=RESERVED), method=method)  # noqa: S310 (http or https)
    if user_info:
        token = base64.b64encode(unquote(user_info).encode()).decode()
        # not sent on to where a redirect leads
        request.add_unredirected_header("Authorization", f"Basic {token}")
    try:
        return cast(HTTPResponse, urllib.request.urlopen(request, timeout=timeout_s))  # noqa: S310
    except HTTPError as error:
        error.close()  # it holds the connection
        raise
