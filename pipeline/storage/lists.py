"""Shard patterns spelled out: braces, and text files that hold patterns, one a line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.errors import UserError
from pipeline.storage.braces import MAX_NAMES, BraceError, count_names, spelled_out
from pipeline.storage.pipes import COMMAND_PREFIX, is_command, named_shard
from pipeline.storage.reading import read_text
from pipeline.storage.urls import host_of, is_local, local_path, split_url, told_url

MAX_LISTS_DEEP = 16
_SPECIAL = re.compile(r"[{}\\*?\[]")


@dataclass
class SpelledPatterns:
    """The names and globs that patterns stand for, once each list and each brace is spelled out.

    Args:
        allow_commands: whether ``pipe:COMMAND`` may stand among them.

    Attributes:
        repeated: how often a list was named again; it is read once.
    """

    allow_commands: bool
    repeated: int = 0
    _names: int = 0
    _read: set[str] = field(default_factory=set)

    def of(self, patterns: Sequence[str], within: tuple[str, ...] = ()) -> Iterator[str]:
        """Spell patterns out.

        Args:
            patterns: paths, URLs, commands, braces, globs, ``@FILE``.
            within: the lists that these stand in, outermost first.

        Raises:
            UserError: a list cannot be read, is empty or names itself, braces are not balanced or stand for
                too many names, or something is neither a path nor a URL.
        """
        for pattern in patterns:
            if pattern.startswith("@"):
                yield from self._of_list(pattern[1:], within)
                continue
            for url in self._spelled_out(pattern):
                self._check(url)
                yield url

    def _of_list(self, url: str, within: tuple[str, ...]) -> Iterator[str]:
        where = _same_list(url)
        if where in within:
            raise UserError(
                f"input.shards: the list {told_url(url)} names itself: {_chain((*within, where))}"
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

    def _spelled_out(self, pattern: str) -> Iterator[str]:
        if not _SPECIAL.search(pattern) or _is_there(pattern):
            return iter([pattern])
        # a command's own backslashes stay
        escape = not is_command(pattern)
        folder, rest = _literal_folder(pattern)
        try:
            names = spelled_out(rest, escape=escape)
            self._names += count_names(rest, escape=escape)
        except BraceError as error:
            raise UserError(f"input.shards: {told_url(pattern)}: {error}") from None
        if self._names > MAX_NAMES:
            raise UserError(f"input.shards: braces stand for more than {MAX_NAMES:,} names in all")
        return (folder + name for name in names)

    def _check(self, url: str) -> None:
        if is_command(url):
            if not self.allow_commands:
                raise UserError(
                    f"input.shards: {COMMAND_PREFIX} would run a command: give a path or a URL, or set "
                    "input.allow_commands"
                )
            named_shard(url)
            return
        try:
            if is_local(url):
                local_path(url)
            elif not host_of(split_url(url)):
                raise UserError(f"{told_url(url)}: expected a bucket or a host after ://, got none")
        except UserError as error:
            raise UserError(f"input.shards: {error}") from None


def _lines(url: str) -> list[str]:
    try:
        text = read_text(url)
    except UserError as error:
        raise UserError(f"input.shards: the list {error}") from None
    # of all that ends a line in Unicode, only this cannot be part of a name
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    patterns = [line for line in lines if line and not line.startswith("#")]
    if not patterns:
        raise UserError(f"input.shards: the list {told_url(url)} names no shard: {_emptiness(text)}")
    return patterns


def _emptiness(text: str) -> str:
    return "it has comments and empty lines alone" if text.strip() else "it is empty"


def _same_list(url: str) -> str:
    return os.path.realpath(local_path(url)) if is_local(url) else url


def _is_there(pattern: str) -> bool:
    try:
        return is_local(pattern) and os.path.lexists(local_path(pattern))
    except UserError:
        return False


def _literal_folder(pattern: str) -> tuple[str, str]:
    """What is there as it is written of a pattern's folders, where they have characters of patterns."""
    if is_command(pattern) or "://" in pattern:
        return "", pattern
    ends = [found.end() for found in re.finditer("/", pattern) if _SPECIAL.search(pattern[: found.end()])]
    end = max((end for end in ends if _is_there(pattern[:end])), default=0)
    return pattern[:end], pattern[end:]


def _chain(lists: Sequence[str]) -> str:
    shown = [told_url(url, 200) for url in lists]
    return " -> ".join(shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]])


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
