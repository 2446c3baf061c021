"""Expand braces in patterns, counting the names first: a few characters can stand for a billion names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import braceexpand

MAX_NAMES = 1_000_000
MAX_CHARACTERS = 1 << 29
MAX_DEPTH = 16
# as braceexpand reads them
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?$")
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?$")
_UNBALANCED = "braces are not balanced; write \\{ and \\} for braces that are part of a name"


class BraceError(ValueError):
    """The braces are not balanced, are nested too deeply, or stand for too many names."""


@dataclass
class _Group:
    """Number of names of the earlier alternatives and of the current one, in braces or the whole pattern."""

    start: int
    earlier: int = 0
    current: int = 1
    has_comma: bool = False

    @property
    def names(self) -> int:
        return self.earlier + self.current

    def begin_next(self) -> None:
        self.earlier, self.current, self.has_comma = self.names, 1, True


def count_names(pattern: str, *, escape: bool = True) -> int:
    """Count the names that a pattern stands for, without making them.

    Args:
        pattern: text with braces as in bash: ``{a,b}``, ``{0..9}``, nested.
        escape: whether a backslash makes the character after it literal.

    Raises:
        BraceError: the braces are not balanced, or nested deeper than MAX_DEPTH.
    """
    groups = [_Group(0)]
    position = 0
    while position < len(pattern):
        character = pattern[position]
        if escape and character == "\\":
            position += 1
        elif character == "{":
            groups.append(_Group(position + 1))
            if len(groups) > MAX_DEPTH:
                raise BraceError(f"braces are nested deeper than {MAX_DEPTH}")
        elif character == "}":
            closed = groups.pop()
            if not groups:
                raise BraceError(_UNBALANCED)
            groups[-1].current *= _names_of(closed, pattern[closed.start : position])
        elif character == "," and len(groups) > 1:
            groups[-1].begin_next()
        position += 1
    if len(groups) != 1:
        raise BraceError(_UNBALANCED)
    return groups[0].names


def _names_of(group: _Group, inside: str) -> int:
    if not group.has_comma and (found := _NUMBERS.match(inside)):
        try:
            first, last, step = (int(number or 1) for number in found.groups())
        except ValueError:
            raise BraceError("a number in braces has too many digits") from None
        return abs(last - first) // (step or 1) + 1
    if not group.has_comma and _LETTERS.match(inside):
        return len(braceexpand.alphabet)
    return group.names


def expand_braces(pattern: str, *, escape: bool = True, most: int = MAX_NAMES) -> Iterator[str]:
    """Return the names that a pattern stands for, in order.

    Raises:
        BraceError: as `count_names`, or there are more than `most` names.
    """
    names = count_names(pattern, escape=escape)
    if names > most or names * len(pattern) > MAX_CHARACTERS:
        number = f"{names:,}" if names < 10**15 else "more than 10^15"
        raise BraceError(f"braces stand for {number} names; the limit is {most:,}")
    return iter(braceexpand.braceexpand(pattern, escape=escape))
