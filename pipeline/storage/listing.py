"""Shard patterns spelled out: braces, globs and lists, to shards with their sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import cast
from urllib.parse import urlsplit

import braceexpand
import pyarrow.fs as pafs

from pipeline.errors import UserError
from pipeline.storage import web
from pipeline.storage.commands import is_command, named_shard
from pipeline.storage.filesystems import resolve
from pipeline.storage.reading import read_text
from pipeline.storage.urls import (
    OBJECT_SCHEMES,
    WEB_SCHEMES,
    ShardSource,
    absolute,
    canonical_url,
    host_of,
    shard_id,
    split_url,
    told_as,
)

SIZE_REQUESTS_AT_ONCE = 32


def list_shards(patterns: str | list[str], *, allow_commands: bool = False) -> list[ShardSource]:
    """Expand shard patterns to a sorted list without repetitions.

    Args:
        patterns: paths or URLs with braces and globs; ``@FILE`` reads patterns from a text file, one a line.
        allow_commands: whether ``pipe:COMMAND`` may stand among them; it is run when the shard is opened.

    Returns:
        The shards, sorted by canonical URL.

    Raises:
        UserError: nothing matches a pattern, the pattern would run a command, or an object store refuses.
    """
    sizes: dict[str, int | None] = {}
    unsized: list[str] = []
    for pattern in _spelled_out([patterns] if isinstance(patterns, str) else patterns, allow_commands):
        if not _is_glob(pattern):
            unsized.append(pattern)
        elif matches := _matches(pattern):
            sizes |= matches
        else:
            raise UserError(f"input.shards: nothing matches {canonical_url(pattern)}")
    sizes |= _sizes_bytes(url for url in dict.fromkeys(unsized) if url not in sizes)
    urls = {canonical_url(url): url for url in sizes}
    return [
        ShardSource(shard_id(known), absolute(known_url), known, sizes[known_url])
        for known, known_url in sorted(urls.items())
    ]


def _spelled_out(patterns: list[str], allow_commands: bool) -> Iterator[str]:
    for pattern in patterns:
        if pattern.startswith("@"):
            yield from _spelled_out(_lines(pattern[1:]), allow_commands)
            continue
        # a command's own backslashes stay
        for url in braceexpand.braceexpand(pattern, escape=not is_command(pattern)):
            _check_is_url(url, allow_commands)
            yield url


def _check_is_url(url: str, allow_commands: bool) -> None:
    if is_command(url):
        if not allow_commands:
            raise UserError(
                f"input.shards: {url.split(maxsplit=1)[0]!r} would run a command: give a path or a URL, "
                "or set input.allow_commands"
            )
        named_shard(url)
        return
    try:
        urlsplit(url)
    except ValueError as error:
        raise UserError(f"input.shards: expected a path or a URL: {error}") from None


def _lines(url: str) -> list[str]:
    try:
        text = read_text(url)
    except UserError as error:
        raise UserError(f"input.shards: the list {error}") from None
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _is_glob(pattern: str) -> bool:
    if is_command(pattern):
        return False
    parts = split_url(pattern)
    where = host_of(parts) + parts.path if parts.scheme in OBJECT_SCHEMES else pattern
    return parts.scheme not in WEB_SCHEMES and any(character in where for character in "*?[")


def _matches(pattern: str) -> dict[str, int]:
    """URLs and sizes of the files that match a glob, by one listing of the folder above it."""
    filesystem, path = resolve(pattern)
    folder, slash, below = _cut_before_glob(path)
    if not slash:
        raise UserError(f"input.shards: {canonical_url(pattern)}: expected the bucket's name, got a glob")
    selector = pafs.FileSelector(folder or "/", recursive="/" in below, allow_not_found=True)
    glob = re.compile(_glob_regex(path))
    with told_as(UserError, pattern, "cannot be listed"):
        infos = filesystem.get_file_info(selector)
    return {
        _url_like(pattern, info.path): info.size
        for info in infos
        if info.is_file and glob.fullmatch(info.path)
    }


def _cut_before_glob(path: str) -> tuple[str, str, str]:
    literal = re.split(r"[*?\[]", path, maxsplit=1)[0]
    folder, slash, _ = literal.rpartition("/")
    return folder, slash, path[len(folder) + 1 :]


def _glob_regex(glob: str) -> str:
    tokens = re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", glob)
    known = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(token)
        or (token.replace("[!", "[^", 1) if re.fullmatch(r"\[[^\]]+\]", token) else re.escape(token))
        for token in tokens
    )


def _url_like(pattern: str, path: str) -> str:
    """The URL of a path found by a pattern, with the pattern's user info and options."""
    parts = split_url(pattern)
    if parts.scheme not in OBJECT_SCHEMES:
        return path
    key = path.partition("/")[2]
    return f"{parts.scheme}://{parts.netloc}/{key}" + (f"?{parts.query}" if parts.query else "")


def _sizes_bytes(urls: Iterable[str]) -> Mapping[str, int | None]:
    listed = list(urls)
    with ThreadPoolExecutor(SIZE_REQUESTS_AT_ONCE) as pool:
        sizes = dict(zip(listed, pool.map(_size_bytes, listed), strict=True))
    _check_buckets(url for url, size in sizes.items() if size is None)
    return sizes


def _size_bytes(url: str) -> int | None:
    if is_command(url):
        return None
    scheme = split_url(url).scheme
    if scheme in WEB_SCHEMES:
        return web.size_bytes(url)
    filesystem, path = resolve(url)
    if scheme in OBJECT_SCHEMES:
        with told_as(UserError, url, "cannot be looked up"):
            return cast("int | None", filesystem.get_file_info(path).size)
    try:
        return cast("int | None", filesystem.get_file_info(path).size)
    except OSError:
        return None


def _check_buckets(urls: Iterable[str]) -> None:
    """Tell a missing bucket, of which no object can be read, from a missing object."""
    objects = [url for url in urls if split_url(url).scheme in OBJECT_SCHEMES]
    for url in {split_url(url).netloc: url for url in objects}.values():
        filesystem, path = resolve(url)
        bucket = path.partition("/")[0]
        with told_as(UserError, url, "its bucket cannot be looked up"):
            if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
                raise UserError(f"{canonical_url(url)}: there is no bucket {bucket!r}")
