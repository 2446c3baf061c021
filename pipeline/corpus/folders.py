"""Find the shards of a local folder by the names of its files; say how to make shards where it has none."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipeline.errors import UserError
from pipeline.shards.file_kinds import HEAD_BYTES, kind_of
from pipeline.storage.urls import is_local, local_path

MOST_FILES = 10_000
THEN_INIT = "; then: legrad init DEST"
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")
# also of formats that are not read, so that each such image is counted with that reason
IMAGE_ENDINGS = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"),
        *(".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2"),
    }
)
_CAPTION_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "captions.csv", "captions.jsonl")


@dataclass(frozen=True)
class FolderContents:
    """The files of a folder, at most MOST_FILES of them.

    Attributes:
        folder: the folder, as it was named.
        suffixes: number of files with each suffix, in lower case.
        tar_pattern: a pattern that names the tars; None where there is none.
        captions_file: name of a file with captions at the top, or None.
        parquet_on_top: whether no Parquet file is in a folder below.
    """

    folder: str
    suffixes: dict[str, int]
    tar_pattern: str | None
    captions_file: str | None
    parquet_on_top: bool

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(count for suffix, count in self.suffixes.items() if suffix in IMAGE_ENDINGS)

    @property
    def parquet_files(self) -> int:
        """Number of Parquet files."""
        return self.suffixes.get(".parquet", 0)

    def way_out(self) -> str:
        """Return how the folder becomes a corpus, in one line."""
        folder = self.folder.rstrip("/")
        if self.tar_pattern is not None:
            return f"name its tars: {shlex.quote(self.tar_pattern)}"
        if self.images:
            table = ["--captions", f"{folder}/{self.captions_file}"] if self.captions_file else []
            command = shlex.join(["legrad", "shards", "images", folder, "DEST", *table])
            return f"it holds {self.images:,} image(s) and no tar; write shards first: {command}{THEN_INIT}"
        if self.parquet_files:
            files = shlex.quote(f"{folder}/{'' if self.parquet_on_top else '**/'}*.parquet")
            return (
                f"it holds {self.parquet_files:,} Parquet file(s) and no tar; write shards first: "
                f"legrad shards parquet {files} DEST --image IMAGE --caption CAPTION{THEN_INIT}"
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
    on_top = all(path.parent == top for path in files if path.suffix.lower() == ".parquet")
    return FolderContents(folder, suffixes, _tar_pattern(folder, top, tars), captions, on_top)


def _tar_pattern(folder: str, top: Path, tars: Sequence[Path]) -> str | None:
    if not tars:
        return None
    endings = sorted({_tar_ending(path.name) for path in tars})
    below = "" if all(path.parent == top for path in tars) else "**/"
    ending = endings[0] if len(endings) == 1 else f"{{{','.join(endings)}}}"
    return f"{folder.rstrip('/')}/{below}*{ending}"


def _tar_ending(name: str) -> str:
    """Return the ending of a tar's name as it is written: patterns tell upper from lower case."""
    return next(name[-len(end) :] for end in TAR_ENDINGS if name.lower().endswith(end))


def is_named_tar(name: str) -> bool:
    """Return whether a file is a tar by its name, compressed or not."""
    return name.lower().endswith(TAR_ENDINGS)


def _files(top: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
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
                raise UserError(f"{corpus}: {found.way_out()}")
            return found.tar_pattern
        if path.is_file():
            with path.open("rb") as stream:
                kind = kind_of(stream.read(HEAD_BYTES))
            if kind is not None:
                raise UserError(f"{corpus}: is {kind.name}, and a shard is a tar; {kind.way_out}")
    except OSError as error:
        raise UserError(f"{corpus}: cannot be read: {error.strerror or error}") from error
    return corpus
