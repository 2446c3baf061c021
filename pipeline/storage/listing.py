"""List the shards that patterns stand for, with the size and version of each."""

from __future__ import annotations

import os
import posixpath
import re
import stat
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pyarrow.fs as pafs

from pipeline.errors import UserError
from pipeline.storage import web
from pipeline.storage.attempts import request
from pipeline.storage.filesystems import resolve
from pipeline.storage.globs import LocalGlob, fits, has_glob
from pipeline.storage.patterns import PatternExpansion
from pipeline.storage.pipes import is_command
from pipeline.storage.sources import InputVersion, ShardSource
from pipeline.storage.urls import (
    LONG_ID_DIGITS,
    OBJECT_SCHEMES,
    WEB_SCHEMES,
    file_url,
    host_of,
    id_of_name,
    is_local,
    local_path,
    raised_as,
    shard_name,
    short_url,
    shown_url,
    split_url,
)

REQUESTS_AT_ONCE = 32
# of a web server, in a row
MOST_UNANSWERED = 16
CONFIG_KEY = "input.shards"


@dataclass(frozen=True)
class ShardListing:
    """The shards that patterns stand for.

    Attributes:
        shards: the shards, sorted by name.
        warnings: a line each, such as on several names of the same file.
    """

    shards: list[ShardSource]
    warnings: tuple[str, ...] = ()


def list_shards(
    patterns: str | Sequence[str], *, allow_commands: bool = False, named: str = CONFIG_KEY
) -> list[ShardSource]:
    """Return the shards of `find_shards` without its warnings.

    Args:
        patterns: see `find_shards`.
        allow_commands: see `find_shards`.
        named: what the user knows the patterns by, which errors begin with.

    Raises:
        UserError: see `find_shards`.
    """
    try:
        return find_shards(patterns, allow_commands=allow_commands).shards
    except UserError as error:
        raise UserError(re.sub(rf"^{re.escape(CONFIG_KEY)}\b", named, str(error))) from None


def find_shards(
    patterns: str | Sequence[str],
    *,
    allow_commands: bool = False,
    check_inputs: bool = True,
    size_timeout_s: float = web.SIZE_TIMEOUT_S,
) -> ShardListing:
    """Expand shard patterns to a sorted list that has each file once.

    Args:
        patterns: paths or URLs with braces and globs; ``@FILE`` reads patterns from a text file, one a line.
            A path that exists as it is written is that file, whatever characters it has.
        allow_commands: whether ``pipe:COMMAND`` is accepted; it is run when the shard is opened.
        check_inputs: whether web servers are asked for the size and version of each object.
        size_timeout_s: seconds in which a web server must answer that; one that leaves several such requests
            in a row unanswered is not asked about its other objects.

    Raises:
        UserError: the patterns name no shard, nothing matches one of them, one is a command and commands are
            not allowed, or an object store refuses a request.
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    if not given:
        raise UserError("input.shards: the list of patterns is empty")
    spelled, found = PatternExpansion(allow_commands), _Found()
    for pattern in spelled.of(given):
        found.take(pattern)
    if not found.sources:
        raise UserError(f"input.shards: names no shard: {', '.join(map(short_url, given[:4]))}")
    servers = _WebServers(size_timeout_s)
    shards = _with_unique_ids(_asked_for(found, check_inputs, servers))
    return ShardListing(shards, (*found.warnings(spelled.repeated), *servers.warnings()))


def _with_unique_ids(shards: Iterable[ShardSource]) -> list[ShardSource]:
    """Sort shards; give longer ids to those that would share an id, and so their results."""
    ordered = sorted(shards, key=lambda shard: shard.canonical_url)
    uses = Counter(shard.shard_id for shard in ordered)
    return [
        shard
        if uses[shard.shard_id] == 1
        else replace(shard, shard_id=id_of_name(shard.canonical_url, digits=LONG_ID_DIGITS))
        for shard in ordered
    ]


def _source(name: str, url: str, size_bytes: int | None = None, mtime_ns: int | None = None) -> ShardSource:
    return ShardSource(id_of_name(name), url, name, size_bytes, mtime_ns)


@dataclass
class _Found:
    """The shards found so far, by name.

    Attributes:
        sources: the shards; remote ones that are named one by one have no size yet.
        unasked: names of the latter.
    """

    sources: dict[str, ShardSource] = field(default_factory=dict)
    unasked: set[str] = field(default_factory=set)
    _first_named: dict[str, str] = field(default_factory=dict)
    _repeated: int = 0
    _repetition: tuple[str, str] = ("", "")
    _aliases: dict[str, str] = field(default_factory=dict)
    _real_folders: dict[str, str] = field(default_factory=dict)

    def take(self, pattern: str) -> None:
        """Add the shards that a name or a glob stands for."""
        scheme = split_url(pattern).scheme
        if is_command(pattern):
            self._note(pattern, _source(shard_name(pattern), pattern))
        elif is_local(pattern):
            self._take_local(pattern)
        elif scheme in OBJECT_SCHEMES and has_glob(_key(pattern)):
            self._take_objects(pattern)
        else:
            source = _source(shard_name(pattern), pattern)
            self._note(pattern, source)
            self.unasked.add(source.canonical_url)

    def _note(self, given: str, source: ShardSource) -> None:
        name = source.canonical_url
        first = self._first_named.setdefault(name, given)
        if name in self.sources:
            self._repetition = self._repetition if self._repeated else (given, first)
            self._repeated += 1
        # of a URL that was signed twice, the later signature is valid for longer
        self.sources[name] = source

    def _take_local(self, pattern: str) -> None:
        path = str(local_path(pattern))
        if not has_glob(path) or os.path.lexists(path):
            self._note(path, self._local_source(path))
            return
        glob = LocalGlob(path)
        with raised_as(UserError, pattern, "cannot be listed"):
            matches = 0
            for real_folder, entry in glob.files():
                self._note(entry.path, _entry_source(real_folder, entry))
                matches += 1
        if not matches:
            raise UserError(f"input.shards: nothing matches {short_url(pattern)}")
        self._aliases |= glob.aliases

    def _local_source(self, path: str) -> ShardSource:
        folder, name = os.path.split(path)
        if name in ("", ".", ".."):
            return _linked_source(path)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        real = posixpath.join(self._real_folders[folder], name)
        try:
            found = os.lstat(real)
        except OSError:
            return _source(file_url(real), real)
        return _linked_source(path) if stat.S_ISLNK(found.st_mode) else _stat_source(real, found)

    def _take_objects(self, pattern: str) -> None:
        matches = _matching_objects(pattern)
        for url, info in matches:
            self._note(url, _source(shard_name(url), url, info.size, info.mtime_ns))
        if not matches:
            raise UserError(f"input.shards: nothing matches {short_url(pattern)}")

    def warnings(self, repeated_lists: int) -> tuple[str, ...]:
        """Return a line for each kind of names that turned out to be the same file or folder."""
        lines = []
        if self._repeated:
            given, first = map(shown_url, self._repetition)
            other = f"{given} is {first}" if given != first else f"{given} is listed twice"
            lines.append(
                f"input.shards: {self._repeated:,} name(s) refer to files that are listed already ({other}); "
                "each file is annotated once"
            )
        if known := self._aliases_with_shards():
            real, alias = known[0]
            lines.append(
                f"input.shards: links lead to {len(known):,} folder(s) that are searched already "
                f"({alias} is {real}); each file is annotated once"
            )
        if repeated_lists:
            lines.append(
                f"input.shards: {repeated_lists:,} list(s) are named more than once; each is read once"
            )
        return tuple(lines)

    def _aliases_with_shards(self) -> list[tuple[str, str]]:
        names = sorted(self.sources) if self._aliases else []

        def holds_a_shard(folder: str) -> bool:
            start = f"{file_url(folder).rstrip('/')}/"
            place = bisect_left(names, start)
            return place < len(names) and names[place].startswith(start)

        return [(real, alias) for real, alias in sorted(self._aliases.items()) if holds_a_shard(real)]


def _linked_source(path: str) -> ShardSource:
    real = os.path.realpath(path)
    try:
        return _stat_source(real, Path(real).stat())
    except OSError:
        return _source(file_url(real), real)


def _entry_source(real_folder: str, entry: os.DirEntry[str]) -> ShardSource:
    if entry.is_symlink():
        return _linked_source(entry.path)
    return _stat_source(posixpath.join(real_folder, entry.name), entry.stat())


def _stat_source(real: str, found: os.stat_result) -> ShardSource:
    if not stat.S_ISREG(found.st_mode):
        return _source(file_url(real), real)
    return _source(file_url(real), real, found.st_size, found.st_mtime_ns)


def _key(url: str) -> str:
    parts = split_url(url)
    return host_of(parts) + parts.path


def _matching_objects(pattern: str) -> list[tuple[str, pafs.FileInfo]]:
    """Return the objects that match a glob with their URLs, from one listing of the folder above it."""
    _, path = resolve(pattern)
    folder, slash, below = _cut_before_glob(path)
    if not slash:
        raise UserError(f"input.shards: {short_url(pattern)}: expected the name of a bucket, got a glob")
    selector = pafs.FileSelector(folder or "/", recursive="/" in below, allow_not_found=True)
    with raised_as(UserError, pattern, "cannot be listed"):
        listed = request(pattern, lambda filesystem, _: filesystem.get_file_info(selector))
    infos = [info for info in listed if info.is_file]
    literal = [info for info in infos if info.path == path]
    matching = literal or [info for info in infos if fits(info.path, path)]
    return [(_url_like(pattern, info.path), info) for info in matching]


def _cut_before_glob(path: str) -> tuple[str, str, str]:
    literal = re.split(r"[*?\[]", path, maxsplit=1)[0]
    folder, slash, _ = literal.rpartition("/")
    return folder, slash, path[len(folder) + 1 :]


def _url_like(pattern: str, path: str) -> str:
    """Return the URL of a path that a pattern found, with the pattern's user info and options."""
    parts = split_url(pattern)
    key = path.partition("/")[2]
    return f"{parts.scheme}://{parts.netloc}/{key}" + (f"?{parts.query}" if parts.query else "")


class _WebServers:
    """Asks web servers for the versions of objects, until one of them no longer answers.

    Args:
        timeout_s: seconds in which a request must be answered.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._unanswered: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()

    def version(self, url: str) -> InputVersion:
        """Return the version of an object; an empty one if its server refuses or does not answer."""
        host = host_of(split_url(url))
        if self._unanswered[host] >= MOST_UNANSWERED:
            self._skipped[host] += 1
            return InputVersion()
        try:
            found = web.ask(url, timeout_s=self._timeout_s)
        except TimeoutError:
            self._unanswered[host] += 1
            return InputVersion()
        self._unanswered[host] = 0
        return found

    def warnings(self) -> list[str]:
        """Return a line for each server that was not asked about all of its objects."""
        return [
            f"input.shards: {host} did not answer {self._unanswered[host]} requests in a row within "
            f"{self._timeout_s:g} s each, so the sizes and versions of {skipped:,} further shard(s) were not "
            "requested; whether they have changed is not checked"
            for host, skipped in sorted(self._skipped.items())
        ]


def _asked_for(found: _Found, check_inputs: bool, servers: _WebServers) -> Iterator[ShardSource]:
    """Return the shards; ask servers for the size and version of those that were named one by one."""
    unasked = [found.sources[name] for name in found.unasked]
    if not check_inputs:
        unasked = [shard for shard in unasked if split_url(shard.url).scheme not in WEB_SCHEMES]
    pool = ThreadPoolExecutor(REQUESTS_AT_ONCE)
    try:
        asked = {shard.canonical_url: shard for shard in pool.map(partial(_asked, servers), unasked)}
    finally:
        # one error ends the listing: the others are not waited for
        pool.shutdown(cancel_futures=True)
    _check_buckets(shard.url for shard in asked.values() if shard.size_bytes is None)
    return (asked.get(name, shard) for name, shard in found.sources.items())


def _asked(servers: _WebServers, shard: ShardSource) -> ShardSource:
    if split_url(shard.url).scheme in WEB_SCHEMES:
        found = servers.version(shard.url)
        return replace(shard, size_bytes=found.size_bytes, mtime_ns=found.mtime_ns, etag=found.etag)
    # an invalid option or region of the URL is named as that
    resolve(shard.url)
    with raised_as(UserError, shard.url, "cannot be looked up"):
        info = request(shard.url, lambda filesystem, path: filesystem.get_file_info(path))
    return replace(shard, size_bytes=info.size, mtime_ns=info.mtime_ns)


def _check_buckets(urls: Iterable[str]) -> None:
    """Raise a UserError for a bucket that does not exist; a missing object is an error of its shard."""
    objects = [url for url in urls if split_url(url).scheme in OBJECT_SCHEMES]
    for url in {split_url(url).netloc: url for url in objects}.values():
        _, path = resolve(url)
        with raised_as(UserError, url, "its bucket cannot be looked up"):
            _check_bucket(url, path.partition("/")[0])


def _check_bucket(url: str, bucket: str) -> None:
    info = request(url, lambda filesystem, _: filesystem.get_file_info(bucket))
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"{short_url(url)}: the bucket {bucket!r} does not exist")
