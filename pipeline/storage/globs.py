"""Globs: ``*``, ``?`` and ``[...]`` within a part of a path, ``**`` for any number of folders."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

GLOB_CHARACTERS = "*?["
ANY_FOLDERS = "**"


def has_glob(path: str) -> bool:
    """Whether a path holds a character of globs."""
    return any(character in path for character in GLOB_CHARACTERS)


def fits(path: str, glob: str) -> bool:
    """Whether a path is one that the glob means, from its first part to its last."""
    parts = glob.split("/")
    positions = frozenset({0})
    for name in path.split("/"):
        positions = _after(positions, name, parts)
    return len(parts) in positions


def _after(positions: frozenset[int], name: str, parts: Sequence[str]) -> frozenset[int]:
    """Where in the glob one can be after one more part of a path, from where one could be before it."""
    reached = set()
    for position in positions:
        while position < len(parts) - 1 and parts[position] == ANY_FOLDERS:
            reached.add(position)
            position += 1  # noqa: PLW2901 (folders may also be none)
        if position < len(parts) and fnmatchcase(name, parts[position]):
            reached.add(position + 1)
    return frozenset(reached)


@dataclass
class LocalGlob:
    """The local files that a glob means. Each folder is looked through once, however many links lead to it.

    Args:
        glob: an absolute path; folders at its beginning that are there literally are taken literally.

    Attributes:
        aliases: real path of each folder that was met under several names, with a name that was not followed.
    """

    glob: str
    aliases: dict[str, str] = field(default_factory=dict)

    def files(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """The real path of the folder and the entry of each file; links that lead nowhere are files too.

        Raises:
            OSError: a folder cannot be listed.
        """
        base, parts = self._literal_beginning()
        first_names: dict[str, str] = {}
        walked: dict[str, frozenset[int]] = {}
        todo = [(base, frozenset({0}))]
        while todo:
            folder, positions = todo.pop()
            real = os.path.realpath(folder)
            if first_names.setdefault(real, folder) != folder:
                self.aliases.setdefault(real, folder)
            positions -= walked.get(real, frozenset())
            walked[real] = walked.get(real, frozenset()) | positions
            for entry in _entries(folder) if positions else ():
                reached = _after(positions, entry.name, parts)
                if reached - {len(parts)} and _is_folder(entry):
                    todo.append((entry.path, reached - {len(parts)}))
                if len(parts) in reached and _is_file(entry):
                    yield real, entry

    def _literal_beginning(self) -> tuple[str, list[str]]:
        base, parts = "/", [part for part in self.glob.split("/") if part]
        while len(parts) > 1 and (not has_glob(parts[0]) or os.path.lexists(posixpath.join(base, parts[0]))):
            base = posixpath.join(base, parts.pop(0))
        return base, parts


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file() or (entry.is_symlink() and not entry.stat())
    except OSError:
        # a link to nothing, to itself, or to what may not be looked at
        return True
