"""Match globs: ``*``, ``?`` and ``[...]`` in a part of a path, ``**`` for any number of folders.

Links to folders are followed, but each folder is searched once, and a name that exists as it is written is
taken literally: glob of the standard library, fsspec and wcmatch give up one or the other.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

GLOB_CHARACTERS = "*?["
ANY_FOLDERS = "**"


def has_glob(path: str) -> bool:
    """Return whether a path has a special character of globs."""
    return any(character in path for character in GLOB_CHARACTERS)


def fits(path: str, glob: str) -> bool:
    """Return whether the whole path matches the glob."""
    parts = glob.split("/")
    positions = frozenset({0})
    for name in path.split("/"):
        positions = _after(positions, name, parts)
    return len(parts) in positions


def _after(positions: frozenset[int], name: str, parts: Sequence[str]) -> frozenset[int]:
    """Return the positions in the glob after one more part of a path, given those before it."""
    reached = set()
    for position in positions:
        while position < len(parts) - 1 and parts[position] == ANY_FOLDERS:
            reached.add(position)
            position += 1  # noqa: PLW2901 (** also matches no folder)
        if position < len(parts) and fnmatchcase(name, parts[position]):
            reached.add(position + 1)
    return frozenset(reached)


@dataclass
class LocalGlob:
    """Finds the local files that match a glob. Each folder is searched once, however many links lead to it.

    Args:
        glob: an absolute path; folders at its beginning that exist under the very name are taken literally.

    Attributes:
        aliases: for the real path of each folder that was found under several names, one name not followed.
    """

    glob: str
    aliases: dict[str, str] = field(default_factory=dict)

    def files(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Yield the real path of the folder and the entry of each file, broken links included.

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
        # a link to nothing, to itself, or to a file without permission
        return True
