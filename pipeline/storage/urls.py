"""Names of files: shards and their ids, URLs as they may be shown or stored, errors without secrets."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

import pyarrow as pa

from pipeline.errors import PipelineError, UserError
from pipeline.storage.braces import BraceError, spelled_out
from pipeline.storage.pipes import COMMAND_PREFIX, is_command, named_shard
from pipeline.storage.signatures import without_signature
from pipeline.text import printable

OBJECT_SCHEMES = ("s3", "gs", "gcs")
WEB_SCHEMES = ("http", "https")
FILE_SCHEME = "file"
ID_DIGITS = 8
# where two shards of a list would have one id
LONG_ID_DIGITS = 16
SHOWN_ALTERNATIVES = 8
MAX_ALTERNATIVES = 100

_KNOWN_SCHEMES = "|".join((*OBJECT_SCHEMES, *WEB_SCHEMES, FILE_SCHEME))
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SLASHES_MISSING = re.compile(rf"({_KNOWN_SCHEMES}):(?!//)/?", re.IGNORECASE)
_RANGE = re.compile(r"\{-?\d+\.\.-?\d+(?:\.\.-?\d+)?\}")
# what ends a clause is not part of a URL in it
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]*[^\s'\"<>.,:;!?)\]}]")
_OPTIONS = re.compile(r"\?(?=[A-Za-z][\w-]*=)")
_CONTROLS_AND_SPACE = "".join(map(chr, range(0x21)))
_FIRST_MARK = 0xE000  # of the characters that stand for nothing
_QUERY_IN_TEXT = re.compile(r"\?[^\s'\"<>]*=[^\s'\"<>]*")


@dataclass(frozen=True)
class ShardSource:
    """One input tar.

    Attributes:
        shard_id: names the output files: the stem, reduced to [A-Za-z0-9._-], and a digest of the URL.
        url: what is opened; may carry a signature, so it is never written down, nor shown in a log.
        canonical_url: the shard's identity as `shard_name` tells it, as which it is shown and stored.
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
    """Split a URL; what has no ``scheme://`` is a path and stays whole, whatever characters it holds.

    In paths and object keys, ``#`` is a character like others, and so is a ``?`` that no ``option=`` follows.

    Raises:
        UserError: a web address that is none.
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
            # which repeats the address
            raise UserError(f"{told_url(url)}: is no valid web address") from None
    location, *query = _OPTIONS.split(url[found.end() :], maxsplit=1)
    authority, slash, key = location.partition("/")
    return SplitResult(scheme, authority, slash + key, "".join(query), "")


def _cleaned(url: str) -> str:
    """Without what urlsplit, and so whoever opens the URL, takes out of it; paths stay as they are."""
    if ":" not in url:
        return url
    cleaned = re.sub("[\t\r\n]", "", url).lstrip(_CONTROLS_AND_SPACE)
    return cleaned if _SCHEME.match(cleaned) else url


def host_of(parts: SplitResult) -> str:
    """The host or bucket, without user info."""
    return parts.netloc.rpartition("@")[2]


def is_local(url: str) -> bool:
    """Whether it is a path or a ``file://`` URL."""
    return not is_command(url) and split_url(url).scheme in ("", FILE_SCHEME)


def local_path(url: str) -> Path:
    """The absolute path that a path or a ``file://`` URL names; ``~`` is the home folder.

    Raises:
        UserError: it names none: a URL that lacks a slash, an empty text, a home folder that nobody knows.
    """
    parts = split_url(url)
    if parts.scheme == FILE_SCHEME:
        if host_of(parts) not in ("", "localhost"):
            told = shown_url(url)
            raise UserError(f"{told}: expected no host; did you mean {told.replace('://', ':///', 1)}?")
        return _absolute(unquote(parts.path, errors="surrogateescape"), url)
    if found := _SLASHES_MISSING.match(url):
        slashes = ":///" if found[1].lower() == FILE_SCHEME else "://"
        meant = told_url(f"{found[1]}{slashes}{url[found.end() :]}")
        raise UserError(
            f"{told_url(url)}: expected a URL with two slashes, or a path; did you mean {meant}? "
            f"(a local file of this name: ./{found[0]}...)"
        )
    return _absolute(_at_home(url), url)


def _absolute(path: str, url: str) -> Path:
    if not path or "\0" in path:
        raise UserError(f"{told_url(url)!r}: expected a path, got {'a NUL byte in it' if path else 'none'}")
    try:
        os.fsencode(path)
        return Path(path).absolute()
    except UnicodeEncodeError:
        raise UserError(
            f"{told_url(url)}: this locale cannot write such a path; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        ) from None
    except FileNotFoundError:
        raise UserError(f"{told_url(url)}: relative to a working folder that no longer exists") from None


def _at_home(path: str) -> str:
    """``~/x`` and ``~user/x`` as a shell reads them, unless there is a file of that very name."""
    if not path.startswith("~") or os.path.lexists(path):
        return path
    expanded = posixpath.expanduser(path)
    if expanded == path and path.partition("/")[0] == "~":
        raise UserError(f"{path}: the home folder is not known; set HOME, or give an absolute path")
    return expanded


def absolute(url: str) -> str:
    """A path that means the same file whatever the working directory; URLs stay as they are."""
    return str(local_path(url)) if is_local(url) else url


def shown_url(text: str) -> str:
    """A path, URL or pattern as it may be shown and stored: without user info, signatures and values.

    User info goes, and so do the parameters of signatures (`pipeline.storage.signatures`); each other value
    of a query becomes a short digest, so that two objects told apart by their query stay two. Of a command
    only the tar that it names is left. Paths stay as they are; a pattern whose braces hide a URL is spelled
    out. What this returns passes unchanged through it. It never raises.
    """
    if "{" not in text or ":" not in text or is_command(text):
        return _shown(text)
    return _shown_pattern(text)


def told_url(text: str, most: int = 400) -> str:
    """The same within a message: cut where it is too long to be read."""
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
    return printable(url if scheme is None else _shown_remote(cleaned, scheme))


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
    """Braces can hide the scheme, and with it what must not be shown: ``{https,http}://user:key@host/``."""
    ranges = _RANGE.findall(pattern)
    marked = pattern
    for number, numbers in enumerate(ranges):
        marked = marked.replace(numbers, chr(_FIRST_MARK + number), 1)
    try:
        alternatives = list(spelled_out(marked, most=MAX_ALTERNATIVES))
    except BraceError:
        beginning = re.match(r"@*[A-Za-z][A-Za-z0-9+.-]*://[^/{]*/[^{]*", pattern)
        return f"{_shown(beginning[0]) if beginning else ''}{{...}}"
    for number, numbers in enumerate(ranges):
        alternatives = [text.replace(chr(_FIRST_MARK + number), numbers) for text in alternatives]
    if any(map(is_command, alternatives)):
        # the others are pieces of the command
        alternatives = [text for text in alternatives if is_command(text)]
    shown = [_shown(text) for text in alternatives]
    if shown == alternatives:
        return printable(pattern)
    more = [f"... ({len(shown)} in all)"] if len(shown) > SHOWN_ALTERNATIVES else []
    return ", ".join([*shown[:SHOWN_ALTERNATIVES], *more])


def shard_name(url: str) -> str:
    """The identity of a shard, by which its results are known: how it is shown and stored.

    Of a local file it is the ``file://`` URL of the real path, links resolved; of others `shown_url`, which
    takes a URL that was signed again for the same; of a command that of the tar which it names.
    """
    if is_command(url):
        return COMMAND_PREFIX + shlex.quote(shard_name(named_shard(url)))
    return file_url(os.path.realpath(local_path(url))) if is_local(url) else _shown(url)


def file_url(path: str) -> str:
    """The ``file://`` URL of an absolute path."""
    return Path(path).as_uri()


def shard_id(url: str, *, digits: int = ID_DIGITS) -> str:
    """The name of a shard's output files: reduced stem, dash, hexadecimal digits of its name's digest."""
    return id_of_name(shard_name(url), digits=digits)


def id_of_name(name: str, *, digits: int = ID_DIGITS) -> str:
    """The shard id that belongs to what `shard_name` returned."""
    url = named_shard(name) if is_command(name) else name
    stem = posixpath.splitext(posixpath.basename(unquote(split_url(url).path)))[0]
    reduced = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:80] or "shard"
    return f"{reduced}-{hashlib.sha256(name.encode()).hexdigest()[:digits]}"


def join_url(folder_url: str, *names: str) -> str:
    """The URL of something in a folder; options of an object store's URL stay at their end."""
    parts = split_url(folder_url)
    options = f"?{parts.query}" if parts.scheme in OBJECT_SCHEMES and parts.query else ""
    return posixpath.join(folder_url.removesuffix(options), *names) + options


def shown_text(text: str) -> str:
    """Free text, such as an error's or a traceback's, with every URL in it as it may be shown."""
    return _URL_IN_TEXT.sub(lambda found: _shown(found[0]), text)


def without_secrets(error: Exception, url: str) -> str:
    """What an error says, in one line, with whatever of the URL must not be written down taken out.

    Other URLs in it, such as where a redirect leads, lose their secrets too.
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
    """Texts of a URL that an error may repeat alone: user info, the query, longer values."""
    rest = _cleaned(url).partition("://")[2]
    location, _, query = rest.partition("?")
    user_info = location.rpartition("@")[0]
    values = [piece.partition("=")[2] for piece in query.split("&")]
    secrets = {user_info, user_info.partition(":")[2], query, *(text for text in values if len(text) > 5)}
    secrets |= {unquote(secret) for secret in secrets}
    return sorted(filter(None, secrets), key=len, reverse=True)


@contextmanager
def told_as(kind: type[PipelineError], url: str, what: str) -> Iterator[None]:
    """Turn errors of files and connections into one of ours that names the file and shows no secret."""
    try:
        yield
    except (OSError, HTTPException, pa.ArrowException) as error:
        # the cause itself would show its secrets in a traceback
        raise kind(f"{told_url(url)}: {what}: {_cut(without_secrets(error, url), 400)}") from None
