"""List the images below a folder in a fixed order, one folder at a time, and count its other files."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.corpus.folders import IMAGE_ENDINGS
from pipeline.datasets.truth_dataset import SkippedRecords
from pipeline.errors import UserError

TABLE_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TEXT_ENDINGS = (".txt", ".TXT")
TABLE_ENDINGS = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json", ".parquet")
MOST_OTHER_TABLES, MOST_IMAGE_FOLDERS = 16, 16


@dataclass
class Survey:
    """What is in a folder beside its images.

    Attributes:
        tables: paths of Hugging Face's tables of captions below the folder.
        other_tables: the first files that may be tables of captions by their endings.
        image_folders: the first folders with images.
        has_texts: whether an image has a text file of the same name beside it.
        shared_stems: paths without ending that several images have.
        skipped: files and folders that are not images, by kind.
        texts: text files beside images, which are counted as skipped where captions come from elsewhere.
        folders: number of folders.
        files: number of files that are not images.
    """

    tables: list[str] = field(default_factory=list)
    other_tables: list[str] = field(default_factory=list)
    image_folders: list[str] = field(default_factory=list)
    has_texts: bool = False
    shared_stems: set[str] = field(default_factory=set)
    skipped: SkippedRecords = field(default_factory=SkippedRecords)
    texts: SkippedRecords = field(default_factory=SkippedRecords)
    folders: int = 0
    files: int = 0


@dataclass(frozen=True)
class _Listing:
    """The entries of one folder, sorted, with its path below the root (empty: the root itself)."""

    below: str
    folders: list[str]
    files: list[str]

    @property
    def images(self) -> list[str]:
        """Names of the images that are not hidden."""
        return [name for name in self.files if _is_image(name)]

    def path(self, name: str) -> str:
        """Return the path of an entry below the root."""
        return posixpath.join(self.below, name)


def images_below(root: Path) -> Iterator[str]:
    """Yield the paths of all images below a folder, folder by folder, sorted."""
    for listing in _listings(root, lambda _error: None):
        yield from map(listing.path, listing.images)


def survey_folder(root: Path, captions: Path | None) -> Survey:
    """Go through a folder once.

    Args:
        root: the folder.
        captions: table of captions that the user named; tables that are found are then other files.

    Raises:
        UserError: a folder has several tables of captions.
    """
    survey = Survey()

    def unreadable(error: OSError) -> None:
        survey.skipped.add("unreadable_folder", f"{error.filename}: {error.strerror}")

    named = None if captions is None else os.path.realpath(captions)
    for listing in _listings(root, unreadable):
        survey.folders += 1
        for name in listing.folders:
            if _is_hidden(name):
                survey.skipped.add("hidden_folder", listing.path(name))
            elif (root / listing.path(name)).is_symlink():
                survey.skipped.add("linked_folder", listing.path(name))
        if named is None:
            _note_tables(survey, listing)
        _note_files(
            survey, listing, lambda path: os.path.realpath(root / path) == named or path in survey.tables
        )
    return survey


def _note_tables(survey: Survey, listing: _Listing) -> None:
    tables = [listing.path(name) for name in TABLE_NAMES if name in listing.files]
    if len(tables) > 1:
        raise UserError(
            f"{tables[0]} and {tables[1]}: expected one table of captions; name it with --captions"
        )
    survey.tables += tables


def _note_files(survey: Survey, listing: _Listing, is_table: Callable[[str], bool]) -> None:
    stems = Counter(posixpath.splitext(name)[0] for name in listing.images)
    if stems and len(survey.image_folders) < MOST_IMAGE_FOLDERS:
        survey.image_folders.append(listing.below)
    survey.shared_stems |= {listing.path(stem) for stem, images in stems.items() if images > 1}
    for name in listing.files:
        path, (stem, ending) = listing.path(name), posixpath.splitext(name)
        if _is_image(name) or is_table(path):
            continue
        survey.files += 1
        if _may_be_table(name, stems) and len(survey.other_tables) < MOST_OTHER_TABLES:
            survey.other_tables.append(path)
        if _is_hidden(name):
            survey.skipped.add("hidden_file", path)
        elif ending in TEXT_ENDINGS and stem in stems:
            survey.has_texts = True
            survey.texts.add("text_beside_image_not_read", path)
        elif ending in TEXT_ENDINGS:
            survey.skipped.add("text_without_image", path)
        else:
            survey.skipped.add("other_file", path)


def _may_be_table(name: str, image_stems: Container[str]) -> bool:
    # a file of the same name as an image is about that image alone
    stem, ending = posixpath.splitext(name)
    return ending.lower() in TABLE_ENDINGS and not _is_hidden(name) and stem not in image_stems


def _listings(root: Path, on_error: Callable[[OSError], None]) -> Iterator[_Listing]:
    for place, folders, files in os.walk(root, onerror=on_error):
        folders.sort()
        below = os.path.relpath(place, root)
        yield _Listing("" if below == "." else below, list(folders), sorted(files))
        # links to folders are listed, but os.walk does not follow them
        folders[:] = [name for name in folders if not _is_hidden(name)]


def _is_image(name: str) -> bool:
    return not _is_hidden(name) and posixpath.splitext(name)[1].lower() in IMAGE_ENDINGS


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
