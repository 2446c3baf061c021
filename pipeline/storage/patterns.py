"""Expand shard patterns: braces, and lists, which are text files with one pattern a line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.errors import UserError
from pipeline.storage.braces import MAX_NAMES, BraceError, count_names, expand_braces
from pipeline.storage.pipes import COMMAND_PREFIX, is_command, named_shard
from pipeline.storage.reading import read_text
from pipeline.storage.urls import host_of, is_local, local_path, short_url, split_url

MAX_LISTS_DEEP = 16
# more than a path can have and web servers accept; globs cost the square of their length
MAX_NAME_CHARACTERS = 8192
_SPECIAL = re.compile(r"[{}\\*?\[]")


@dataclass
class PatternExpansion:
    """Expands patterns to the names and globs that they stand for.

    Args:
        allow_commands: whether ``pipe:COMMAND`` is accepted.

    Attributes:
        repeated: number of lists that were named again; each list is read once.
    """

    allow_commands: bool
    repeated: int = 0
    _names: int = 0
    _read: set[str] = field(default_factory=set)

    def of(self, patterns: Sequence[str], within: tuple[str, ...] = ()) -> Iterator[str]:
        """Return the names and globs of patterns.

        Args:
            patterns: paths, URLs, commands, braces, globs, ``@FILE``.
            within: the lists that hold these patterns, outermost first.

        Raises:
            UserError: a list cannot be read, is empty or names itself, braces are not balanced or stand for
                too many names, a name is too long, or neither a path nor a URL.
        """
        for pattern in patterns:
            if pattern.startswith("@"):
                yield from self._of_list(pattern[1:], within)
                continue
            for url in self._expanded(pattern):
                self._check(url)
                yield url

    def _of_list(self, url: str, within: tuple[str, ...]) -> Iterator[str]:
        where = _same_list(url)
        if where in within:
            raise UserError(
                f"input.shards: the list {short_url(url)} includes itself: {_chain((*within, where))}"
            )
        if len(within) >= MAX_LISTS_DEEP:
            raise UserError(
                f"input.shards: more than {MAX_LISTS_DEEP} lists within lists: {_chain((*within, where))}"
            )
        if where in self._read:
            self.repeated += 1
            return
        self._read.add(where)
        yield from self.of(_lines(url), (*within, where))

    def _expanded(self, pattern: str) -> Iterator[str]:
        if not _SPECIAL.search(pattern) or _is_there(pattern):
            return iter([pattern])
        # backslashes in a command are the command's own
        escape = not is_command(pattern)
        folder, rest = _literal_folder(pattern)
        try:
            names = expand_braces(rest, escape=escape)
            self._names += count_names(rest, escape=escape)
        except BraceError as error:
            raise UserError(f"input.shards: {short_url(pattern)}: {error}") from None
        if self._names > MAX_NAMES:
            raise UserError(f"input.shards: braces stand for more than {MAX_NAMES:,} names in all")
        return (folder + name for name in names)

    def _check(self, url: str) -> None:
        if len(url) > MAX_NAME_CHARACTERS:
            raise UserError(
                f"input.shards: {short_url(url, 80)}: has {len(url):,} characters; the limit is "
                f"{MAX_NAME_CHARACTERS:,}"
            )
        if is_command(url):
            if not self.allow_commands:
                raise UserError(
                    f"input.shards: {COMMAND_PREFIX} runs a command, which is not allowed; give a path or a "
                    "URL, or set input.allow_commands to true"
                )
            named_shard(url)
            return
        try:
            if is_local(url):
                local_path(url)
            elif not host_of(split_url(url)):
                raise UserError(f"{short_url(url)}: expected a bucket or a host after ://, got none")
        except UserError as error:
            raise UserError(f"input.shards: {error}") from None


def _lines(url: str) -> list[str]:
    try:
        text = read_text(url)
    except UserError as error:
        raise UserError(f"input.shards: the list {error}") from None
    # of all characters that end a line in Unicode, only these cannot be part of a name
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    patterns = [line for line in lines if line and not line.startswith("#")]
    if not patterns:
        problem = "it has only comments and empty lines" if text.strip() else "it is empty"
        raise UserError(f"input.shards: the list {short_url(url)} names no shard: {problem}")
    return patterns


def _same_list(url: str) -> str:
    return os.path.realpath(local_path(url)) if is_local(url) else url


def _is_there(pattern: str) -> bool:
    try:
        return is_local(pattern) and os.path.lexists(local_path(pattern))
    except UserError:
        return False


def _literal_folder(pattern: str) -> tuple[str, str]:
    """Split off the folders of a pattern that exist under the very name, characters of patterns included."""
    if is_command(pattern) or "://" in pattern:
        return "", pattern
    ends = [found.end() for found in re.finditer("/", pattern) if _SPECIAL.search(pattern[: found.end()])]
    end = max((end for end in ends if _is_there(pattern[:end])), default=0)
    return pattern[:end], pattern[end:]


def _chain(lists: Sequence[str]) -> str:
    shown = [short_url(url, 200) for url in lists]
    return " -> ".join(shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]])
