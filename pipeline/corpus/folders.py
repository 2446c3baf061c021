"""Find the shards of a local folder by the names of its files; say how to make shards where it has none."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipeline.errors import UserError
from pipeline.shards.file_kinds import HEAD_BYTES, kind_of
from pipeline.storage.urls import is_local, local_path

MOST_FILES = 10_000
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")
_CAPTION_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "captions.csv", "captions.jsonl")


@dataclass(frozen=True)
class FolderContents:
    """The files of a folder, at most MOST_FILES of them.

    Attributes:
        folder: the folder, as it was named.
        suffixes: number of files with each suffix, in lower case.
        tar_pattern: a pattern that names the tars; None where there is none.
        captions_file: name of a file with captions at the top, or None.
    """

    folder: str
    suffixes: dict[str, int]
    tar_pattern: str | None
    captions_file: str | None

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(count for suffix, count in self.suffixes.items() if suffix in _IMAGE_SUFFIXES)

    @property
    def parquet_files(self) -> int:
        """Number of Parquet files."""
        return self.suffixes.get(".parquet", 0)

    def way_out(self) -> str:
        """Return how the folder becomes a corpus, in one line."""
        folder = self.folder.rstrip("/")
        if self.tar_pattern is not None:
            return f"name its tars: '{self.tar_pattern}'"
        if self.images:
            captions = f" --captions {folder}/{self.captions_file}" if self.captions_file else ""
            return (
                f"it holds {self.images:,} image(s) and no tar; write shards first: "
                f"legrad shards images {folder} DEST{captions}"
            )
        if self.parquet_files:
            return (
                f"it holds {self.parquet_files:,} Parquet file(s) and no tar; write shards first: "
                f"legrad shards parquet '{folder}/*.parquet' DEST --image IMAGE --caption CAPTION"
            )
        common = Counter(self.suffixes).most_common(5)
        found = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in common)
        return f"it holds no tar; {f'files: {found}' if found else 'it is empty'}"


def look_into_folder(folder: str) -> FolderContents:
    """Count the files of a local folder and the folders in it, by their names; none is opened.

    Args:
        folder: path of the folder.

    Raises:
        OSError: the folder cannot be listed.
    """
    top = Path(folder).expanduser()
    # of a folder that cannot be listed, os.walk yields nothing
    next(top.iterdir(), None)
    files = list(islice(_files(top), MOST_FILES))
    tars = [path for path in files if is_named_tar(path.name)]
    names = {path.name for path in files if path.parent == top}
    captions = next((name for name in _CAPTION_FILES if name in names), None)
    suffixes = dict(Counter(path.suffix.lower() for path in files))
    return FolderContents(folder, suffixes, _tar_pattern(folder, top, tars), captions)


def _tar_pattern(folder: str, top: Path, tars: Sequence[Path]) -> str | None:
    if not tars:
        return None
    endings = {next(end for end in TAR_ENDINGS if path.name.lower().endswith(end)) for path in tars}
    below = "" if all(path.parent == top for path in tars) else "**/"
    return f"{folder.rstrip('/')}/{below}*{endings.pop() if len(endings) == 1 else '.t*'}"


def is_named_tar(name: str) -> bool:
    """Return whether a file is a tar by its name, compressed or not."""
    return name.lower().endswith(TAR_ENDINGS)


def _files(top: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(top):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def shard_pattern(corpus: str) -> str:
    """Return the pattern of shards for what a user names as a corpus.

    Args:
        corpus: a pattern or URL, which is returned as it is; or a local folder or file.

    Raises:
        UserError: it is a folder without tars, or a file that is no tar; the error says how to make shards.
    """
    if not is_local(corpus) or corpus.startswith("@"):
        return corpus
    path = local_path(corpus)
    try:
        if path.is_dir():
            found = look_into_folder(corpus)
            if found.tar_pattern is None:
                raise UserError(f"{corpus}: {found.way_out()}; then: legrad init DEST")
            return found.tar_pattern
        if path.is_file():
            with path.open("rb") as stream:
                kind = kind_of(stream.read(HEAD_BYTES))
            if kind is not None:
                raise UserError(f"{corpus}: is {kind.name}, and a shard is a tar; {kind.way_out}")
    except OSError as error:
        raise UserError(f"{corpus}: cannot be read: {error.strerror or error}") from error
    return corpus
