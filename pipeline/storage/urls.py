"""Names of files: paths and URLs, ids of shards, and texts without secrets for logs and storage."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

import pyarrow as pa

from pipeline.errors import PipelineError, UserError
from pipeline.storage.braces import BraceError, expand_braces
from pipeline.storage.pipes import COMMAND_PREFIX, is_command, named_shard
from pipeline.storage.signatures import without_signature
from pipeline.text import printable

OBJECT_SCHEMES = ("s3", "gs", "gcs")
WEB_SCHEMES = ("http", "https")
FILE_SCHEME = "file"
ID_DIGITS = 8
# for shards of a list that would have the same id
LONG_ID_DIGITS = 16
SHOWN_ALTERNATIVES = 8
MAX_ALTERNATIVES = 100

_KNOWN_SCHEMES = "|".join((*OBJECT_SCHEMES, *WEB_SCHEMES, FILE_SCHEME))
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SLASHES_MISSING = re.compile(rf"({_KNOWN_SCHEMES}):(?!//)/?", re.IGNORECASE)
_RANGE = re.compile(r"\{-?\d+\.\.-?\d+(?:\.\.-?\d+)?\}")
# punctuation at the end of a clause is not part of the URL
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]*[^\s'\"<>.,:;!?)\]}]")
_OPTIONS = re.compile(r"\?(?=[A-Za-z][\w-]*=)")
_CONTROLS_AND_SPACE = "".join(map(chr, range(0x21)))
_FILE_URL_IN_TEXT = re.compile(rf"{FILE_SCHEME}://[^\s'\"<>]+")
_FIRST_MARK = 0xE000  # the first character of Unicode's private use area
_QUERY_IN_TEXT = re.compile(r"\?[^\s'\"<>]*=[^\s'\"<>]*")


def split_url(url: str) -> SplitResult:
    """Split a URL; a text without ``scheme://`` is a path and is kept whole, whatever characters it has.

    In paths and object keys, ``#`` is an ordinary character, and so is ``?`` unless ``option=`` follows.

    Raises:
        UserError: the web address is invalid.
    """
    url = _cleaned(url)
    found = _SCHEME.match(url)
    if found is None:
        return SplitResult("", "", url, "", "")
    scheme = found[1].lower()
    if scheme not in (*OBJECT_SCHEMES, FILE_SCHEME):
        try:
            return urlsplit(url)
        except ValueError:
            # the error would repeat the address
            raise UserError(f"{short_url(url)}: is not a valid web address") from None
    location, *query = _OPTIONS.split(url[found.end() :], maxsplit=1)
    authority, slash, key = location.partition("/")
    return SplitResult(scheme, authority, slash + key, "".join(query), "")


def _cleaned(url: str) -> str:
    """Remove from a URL what urlsplit, and so every client, removes; keep paths as they are."""
    if ":" not in url:
        return url
    cleaned = re.sub("[\t\r\n]", "", url).lstrip(_CONTROLS_AND_SPACE)
    return cleaned if _SCHEME.match(cleaned) else url


def host_of(parts: SplitResult) -> str:
    """Return the host or bucket, without user info."""
    return parts.netloc.rpartition("@")[2]


def is_local(url: str) -> bool:
    """Return whether it is a path or a ``file://`` URL."""
    return not is_command(url) and split_url(url).scheme in ("", FILE_SCHEME)


def local_path(url: str) -> Path:
    """Return the absolute path of a path or a ``file://`` URL; ``~`` is the home folder.

    Raises:
        UserError: it is empty, a URL that lacks a slash, or in a home folder that is not known.
    """
    parts = split_url(url)
    if parts.scheme == FILE_SCHEME:
        if host_of(parts) not in ("", "localhost"):
            shown = shown_url(url)
            raise UserError(f"{shown}: expected no host; did you mean {shown.replace('://', ':///', 1)}?")
        return _absolute(unquote(parts.path, errors="surrogateescape"), url)
    if found := _SLASHES_MISSING.match(url):
        slashes = ":///" if found[1].lower() == FILE_SCHEME else "://"
        meant = short_url(f"{found[1]}{slashes}{url[found.end() :]}")
        raise UserError(
            f"{short_url(url)}: expected a URL with two slashes, or a path; did you mean {meant}? "
            f"(For a local file of this name, write ./{found[0]}...)"
        )
    return _absolute(_at_home(url), url)


def _absolute(path: str, url: str) -> Path:
    if not path or "\0" in path:
        raise UserError(
            f"{short_url(url)!r}: expected a path, got {'one with a NUL byte' if path else 'an empty text'}"
        )
    try:
        os.fsencode(path)
        return Path(path).absolute()
    except UnicodeEncodeError:
        raise UserError(
            f"{short_url(url)}: this locale cannot encode the path; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        ) from None
    except FileNotFoundError:
        raise UserError(
            f"{short_url(url)}: the path is relative to a working folder that no longer exists"
        ) from None


def _at_home(path: str) -> str:
    """Expand ``~/x`` and ``~user/x`` as a shell does, unless there is a file of that very name."""
    if not path.startswith("~") or os.path.lexists(path):
        return path
    expanded = posixpath.expanduser(path)
    if expanded == path and path.partition("/")[0] == "~":
        raise UserError(f"{path}: the home folder is not known; set HOME, or give an absolute path")
    return expanded


def absolute(url: str) -> str:
    """Return an absolute path; URLs are returned as they are."""
    return str(local_path(url)) if is_local(url) else url


def shown_url(text: str) -> str:
    """Return a path, URL or pattern as it may be logged and stored, without secrets.

    User info and the parameters of signatures (`pipeline.storage.signatures`) are removed; each other value
    of a query is replaced by a short digest, so that objects that differ in their query stay different. Of a
    command, only the tar that it names is kept. Paths are kept; a pattern whose braces hide a URL is
    expanded. The function is idempotent and never raises.
    """
    if "{" not in text or ":" not in text or is_command(text):
        return _shown(text)
    return _shown_pattern(text)


def short_url(text: str, most: int = 400) -> str:
    """Return `shown_url`, cut to a length that suits a message."""
    return _cut(shown_url(text), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _shown(url: str) -> str:
    if url.startswith("@"):
        listed = url.lstrip("@")
        return "@" * (len(url) - len(listed)) + shown_url(listed)
    if is_command(url):
        try:
            return COMMAND_PREFIX + shlex.quote(_shown(named_shard(url)))
        except UserError:
            return f"{COMMAND_PREFIX}..."
    cleaned = _cleaned(url)
    scheme = _SCHEME.match(cleaned) or _SLASHES_MISSING.match(cleaned)
    shown = printable(url if scheme is None else _shown_remote(cleaned, scheme))
    # what is a command once it is cleaned may hide secrets as one
    return _shown(shown) if is_command(shown) else shown


def _shown_remote(url: str, scheme: re.Match[str]) -> str:
    name, rest = scheme[1].lower(), url[scheme.end() :]
    if name in (*OBJECT_SCHEMES, FILE_SCHEME):
        location, *query = _OPTIONS.split(rest, maxsplit=1)
    else:
        location, *query = rest.partition("#")[0].split("?", 1)
    authority, slash, path = location.partition("/")
    if re.match(r"[^@\[]*:\D[^@]*$", authority) and "@" in path:
        # a password with a slash in it
        authority, slash, path = path.rpartition("@")[2].partition("/")
    host = authority.rpartition("@")[2]
    kept = without_signature("".join(query))
    prefix = url[: scheme.end()].lower()
    host = host.lower() if name in WEB_SCHEMES else host
    return f"{prefix}{host}{slash}{path}" + (f"?{kept}" if kept else "")


def _shown_pattern(pattern: str) -> str:
    """Return a pattern without secrets; braces can hide a scheme: ``{https,http}://user:key@host/``."""
    ranges = _RANGE.findall(pattern)
    marked = pattern
    for number, numbers in enumerate(ranges):
        marked = marked.replace(numbers, chr(_FIRST_MARK + number), 1)
    try:
        alternatives = list(expand_braces(marked, most=MAX_ALTERNATIVES))
    except BraceError:
        beginning = re.match(r"@*[A-Za-z][A-Za-z0-9+.-]*://[^/{]*/[^{]*", pattern)
        return f"{_shown(beginning[0]) if beginning else ''}{{...}}"
    for number, numbers in enumerate(ranges):
        alternatives = [text.replace(chr(_FIRST_MARK + number), numbers) for text in alternatives]
    if any(map(is_command, alternatives)):
        # the other alternatives are pieces of the command
        alternatives = [text for text in alternatives if is_command(text)]
    shown = [_shown(text) for text in alternatives]
    if shown == alternatives:
        return printable(pattern)
    more = [f"... ({len(shown)} in all)"] if len(shown) > SHOWN_ALTERNATIVES else []
    return ", ".join([*shown[:SHOWN_ALTERNATIVES], *more])


def shard_name(url: str) -> str:
    """Return the identity of a shard, which is logged, stored and identifies its results.

    It is the ``file://`` URL of a local file's real path, with links resolved; `shown_url` of other URLs,
    which is the same after a URL was signed again; and for a command that of the tar which it names.
    """
    if is_command(url):
        return COMMAND_PREFIX + shlex.quote(shard_name(named_shard(url)))
    return file_url(os.path.realpath(local_path(url))) if is_local(url) else _shown(url)


def file_url(path: str) -> str:
    """Return the ``file://`` URL of an absolute path."""
    return Path(path).as_uri()


def shard_id(url: str, *, digits: int = ID_DIGITS) -> str:
    """Return the name of a shard's output files: reduced stem, dash, hexadecimal digits of a digest."""
    return id_of_name(shard_name(url), digits=digits)


def id_of_name(name: str, *, digits: int = ID_DIGITS) -> str:
    """Return the shard id for what `shard_name` returned."""
    url = named_shard(name) if is_command(name) else name
    stem = posixpath.splitext(posixpath.basename(unquote(split_url(url).path)))[0]
    reduced = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:80] or "shard"
    return f"{reduced}-{hashlib.sha256(name.encode()).hexdigest()[:digits]}"


def join_url(folder_url: str, *names: str) -> str:
    """Return the URL of something in a folder; options of an object store's URL stay at its end."""
    parts = split_url(folder_url)
    options = f"?{parts.query}" if parts.scheme in OBJECT_SCHEMES and parts.query else ""
    return posixpath.join(folder_url.removesuffix(options), *names) + options


def shown_text(text: str) -> str:
    """Return a text, such as an error or a traceback, in which every URL is as it may be shown."""
    return _URL_IN_TEXT.sub(lambda found: _shown(found[0]), text)


def with_plain_paths(text: str) -> str:
    """Return a text for people, in which the paths of ``file://`` URLs are written as they were typed."""
    return _FILE_URL_IN_TEXT.sub(lambda found: printable(unquote(found[0], errors="surrogateescape")), text)


def without_secrets(error: Exception, url: str) -> str:
    """Return an error's message in one line, without the secrets of the URL.

    Secrets of other URLs in it, such as the target of a redirect, are removed too.
    """
    text = printable(" ".join(str(error).split()))
    scheme = _SCHEME.match(_cleaned(url))
    if scheme is not None and scheme[1].lower() != FILE_SCHEME:
        text = text.replace(url, shown_url(url))
    text = shown_text(text)
    if scheme is None or scheme[1].lower() == FILE_SCHEME:
        return text
    for secret in _secrets_of(url):
        text = text.replace(secret, "***")
    return _QUERY_IN_TEXT.sub(_shown_query, text)


def _shown_query(found: re.Match[str]) -> str:
    kept = without_signature(found[0][1:])
    return f"?{kept}" if kept else ""


def _secrets_of(url: str) -> list[str]:
    """Return parts of a URL that an error may repeat: user info, the query, longer values."""
    rest = _cleaned(url).partition("://")[2]
    location, _, query = rest.partition("?")
    user_info = location.rpartition("@")[0]
    values = [piece.partition("=")[2] for piece in query.split("&")]
    secrets = {user_info, user_info.partition(":")[2], query, *(text for text in values if len(text) > 5)}
    # of a password with a slash in it, an error repeats what precedes the slash
    secrets |= {piece for piece in re.split("[:/@]", user_info) if len(piece) > 3}
    secrets |= {unquote(secret) for secret in secrets}
    return sorted(filter(None, secrets), key=len, reverse=True)


@contextmanager
def raised_as(kind: type[PipelineError], url: str, what: str) -> Iterator[None]:
    """Replace errors of files and connections by one that names the file and shows no secret."""
    try:
        yield
    except (OSError, HTTPException, pa.ArrowException) as error:
        # a traceback of the cause would show its secrets
        raise kind(f"{short_url(url)}: {what}: {_reason(error, url)}") from None


def _reason(error: Exception, url: str) -> str:
    # libraries add the number of the error and the path, which the message has already
    if isinstance(error, OSError) and error.errno and is_local(url):
        return os.strerror(error.errno)
    return _cut(without_secrets(error, url), 400)
