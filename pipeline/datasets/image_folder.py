"""Read a folder of images, with captions from tables or from a text file beside each image.

Hugging Face's imagefolder is read as it is: ``metadata.csv``, ``metadata.jsonl`` or ``metadata.parquet``, in
the folder or in folders below it, with the columns ``file_name`` and ``text``.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import posixpath
import re
import shlex
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from pipeline.corpus.folders import IMAGE_ENDINGS, is_named_tar
from pipeline.datasets.caption_tables import CaptionTable, TableRow, open_caption_table
from pipeline.datasets.captioned import Scalar, sample_members
from pipeline.datasets.conversion import Item, Members, SampleSource
from pipeline.datasets.folder_walk import (
    TEXT_ENDINGS,
    Survey,
    images_below,
    survey_folder,
)
from pipeline.datasets.truth_dataset import read_path, require_folder
from pipeline.datasets.unnamed_tables import NO_TABLE, UnnamedTable, find_unnamed_table
from pipeline.errors import SampleFailure, UserError
from pipeline.shards.captions import MAX_CAPTIONS
from pipeline.text import printable

MAX_KEY_CHARACTERS = 160
DIGEST_BYTES = 6
_PLAIN_STEM = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]*/)*[A-Za-z0-9_-]+")
# would look like a key with a digest
_ENDS_WITH_DIGEST = re.compile(rf"(^|-)[0-9a-f]{{{2 * DIGEST_BYTES}}}$")


@dataclass(frozen=True)
class FolderSource:
    """A folder of images as the source of samples.

    Attributes:
        samples: the samples.
        captions: where their captions come from, for people; None: they have none.
        unread_table: a table whose rows name images, too, and that is not read.
    """

    samples: SampleSource
    captions: str | None
    unread_table: Path | None = None


@dataclass(frozen=True)
class _Entry:
    """An image, or a row without one.

    Attributes:
        name: the owner's name of the image, or the place of the row.
        path: path of the image below the folder; None where the row names none.
        captions: captions in the table; None: they are not in a table.
        columns: further values in the table.
        failure: kind and message of the reason to skip the image; None: it is read.
    """

    name: str
    path: str | None
    captions: tuple[object, ...] | None = None
    columns: dict[str, Scalar] = field(default_factory=dict)
    failure: tuple[str, str] | None = None


def open_image_folder(
    root: Path,
    captions: Path | None = None,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> FolderSource:
    """Open a folder of images, searched through all folders below it.

    Args:
        root: the folder.
        captions: table whose rows name images below the folder; `none`: there are no captions; None: the
            tables named metadata, else a file KEY.txt beside each image, else there are no captions.
        image_column: column with the names of images; None: file_name.
        caption_column: column with the captions; None: text, else caption.

    Raises:
        UserError: there is no such folder or table, the table has no such columns, there is no image, or
            no captions were named or found and a table names images.
    """
    require_folder(root, "images")
    survey = survey_folder(root, captions)
    tables = [(root / path, posixpath.dirname(path)) for path in survey.tables]
    if captions is not None:
        survey.has_texts = survey.has_texts and captions != Path(NO_TABLE)
        tables = [] if captions == Path(NO_TABLE) else [(captions, "")]
    unread = None if tables or captions is not None else _unnamed_table(root, survey)
    if unread is not None and not survey.has_texts:
        raise UserError(unread.problem(root))
    folder = _Folder(
        root,
        root.resolve(),
        tuple((open_caption_table(path, image_column, caption_column), below) for path, below in tables),
        survey,
    )
    if not tables and (image_column or caption_column):
        raise UserError(
            f"{root}: has no table of captions (metadata.csv, .jsonl or .parquet); name one with --captions"
        )
    fingerprint, images = _identity(folder.entries())
    if not images:
        raise UserError(
            f"{root}: no image found, in {survey.folders} folder(s) with {survey.files} other file(s)"
            f"{_examples(root, survey.skipped.names.get('other_file', []))}"
        )
    if not folder.reads_texts:
        survey.skipped.counts.update(survey.texts.counts)
        survey.skipped.names.update(survey.texts.names)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", root.resolve().name) or "images"
    samples = SampleSource(name, fingerprint, images, folder.items, skipped=survey.skipped)
    return FolderSource(samples, folder.description, None if unread is None else unread.path)


def _unnamed_table(root: Path, survey: Survey) -> UnnamedTable | None:
    roots = dict.fromkeys([root, *(root / below for below in survey.image_folders)])
    return find_unnamed_table([root / path for path in survey.other_tables], list(roots))


@dataclass(frozen=True)
class _Folder:
    """A folder whose files were listed once.

    Attributes:
        root: the folder.
        real_root: the folder, with links resolved.
        tables: tables of captions, each with the folder in which its rows name images.
        survey: what was found.
    """

    root: Path
    real_root: Path
    tables: Sequence[tuple[CaptionTable, str]]
    survey: Survey

    @property
    def reads_texts(self) -> bool:
        """Whether captions are in text files beside the images."""
        return not self.tables and self.survey.has_texts

    @property
    def description(self) -> str | None:
        """Where captions come from; None: nowhere."""
        if self.reads_texts:
            return "the .txt file beside each image"
        names = [f"{table.path} (column {table.caption_column})" for table, _ in self.tables[:3]]
        more = f" and {len(self.tables) - 3} more" if len(self.tables) > 3 else ""
        return ", ".join(names) + more if names else None

    def items(self, start: int) -> Iterator[Item]:
        """Yield the items from an ordinal on; nothing is read for those before."""
        for entry in itertools.islice(self.entries(), start, None):
            yield Item(printable(entry.name), self._key(entry), partial(self._members, entry))

    def entries(self) -> Iterator[_Entry]:
        """Yield every image once: those of the tables in the order of rows, then those without a row."""
        if not self.tables:
            for path in images_below(self.root):
                yield _Entry(path, path)
            return
        seen: set[int] = set()
        for table, below in self.tables:
            # several rows of one image, as in Flickr8k, are its captions
            for _, rows in itertools.groupby(table.rows(), _group_of):
                entry = _entry_of(below, rows)
                number = None if entry.path is None else _number(entry.path)
                if number in seen:
                    message = "an earlier row names the same image; several captions must be in adjacent rows"
                    yield _Entry(entry.name, None, failure=("duplicate", message))
                    continue
                if number is not None:
                    seen.add(number)
                yield entry
        for path in images_below(self.root):
            if _number(path) not in seen:
                yield _Entry(path, path, failure=("no_row", "no row of the captions names the image"))

    def _key(self, entry: _Entry) -> str:
        return "" if entry.path is None else image_key(entry.path, self.survey.shared_stems)

    def _members(self, entry: _Entry) -> Members:
        if entry.failure is not None or entry.path is None:
            raise SampleFailure("read", *(entry.failure or ("bad_row", "the row names no image")))
        image = self._image(entry.path)
        captions: Sequence[object] | None = entry.captions
        if self.reads_texts:
            captions = [self._text(posixpath.splitext(entry.path)[0])]
        return sample_members(image, captions, entry.columns, printable(entry.path))

    def _image(self, path: str) -> bytes:
        try:
            return self._read(path, "missing_image")
        except SampleFailure as failure:
            if failure.kind != "missing_image":
                raise
            message = failure.message + _similar_file(self.root, path)
            raise SampleFailure("open", "missing_image", message) from None

    def _text(self, stem: str) -> str:
        usual, upper = (stem + ending for ending in TEXT_ENDINGS)
        path = (
            upper if not os.path.lexists(self.root / usual) and os.path.lexists(self.root / upper) else usual
        )
        try:
            return self._read(path, "no_caption").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            message = f"{printable(path)}: is not UTF-8: {error.reason} at byte {error.start}"
            raise SampleFailure("caption", "caption_not_utf8", message) from error

    def _read(self, path: str, missing: str) -> bytes:
        try:
            real = Path(os.path.realpath(self.root / path))
            if not real.is_relative_to(self.real_root):
                message = (
                    f"{printable(path)} is a link that leads out of the folder; only what is in it is read "
                    "(`cp -rL FOLDER COPY` makes a copy without links)"
                )
                raise SampleFailure("open", "link_outside", message)
            return read_path(self.root / path, missing=missing)
        # a name that no file can have, such as half of a surrogate pair
        except ValueError as error:
            raise SampleFailure("open", "unsafe_name", f"{printable(path)}: {error}") from error


def image_key(path: str, shared_stems: frozenset[str] | set[str] = frozenset()) -> str:
    """Return the key of an image: its path without the ending, where that is safe and belongs to it alone.

    Otherwise other characters become underscores, and a digest of the path is appended, so that keys differ.

    Args:
        path: of the image below its folder.
        shared_stems: paths without ending that several images have.
    """
    stem, ending = posixpath.splitext(path)
    is_plain = (
        _PLAIN_STEM.fullmatch(stem) is not None
        and ending.lower() in IMAGE_ENDINGS
        and len(stem) <= MAX_KEY_CHARACTERS
        # members of such names describe an archive
        and not stem.startswith("__")
        and not _ENDS_WITH_DIGEST.search(stem)
        and stem not in shared_stems
    )
    if is_plain:
        return stem
    safe = re.sub(r"[^A-Za-z0-9_/-]", "_", stem).lstrip("_/")[: MAX_KEY_CHARACTERS - 2 * DIGEST_BYTES - 1]
    return f"{safe or 'image'}-{_digest(path, DIGEST_BYTES).hex()}"


def _examples(root: Path, names: Sequence[str]) -> str:
    """Return an example of files that are no images, as the end of a message; empty where there is none."""
    tar = next((name for name in names if is_named_tar(name)), None)
    if tar is not None:
        command = shlex.join(["legrad", "init", str(root)])
        return f" such as {printable(tar)}; a tar is a shard already, and needs no conversion: {command}"
    return f" such as {printable(names[0])}" if names else ""


def _similar_file(root: Path, path: str) -> str:
    """Return the file that a row perhaps means, as the end of a message; empty where there is none."""
    forms = [unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)]
    other_form = next((form for form in forms if form != path and (root / form).is_file()), None)
    if other_form is not None:
        return (
            f"; there is the same name in another Unicode normal form, {other_form!a} (convmv renames files)"
        )
    stem, ending = posixpath.splitext(path)
    endings = sorted(IMAGE_ENDINGS)
    names = [path.replace("\\", "/"), stem + ending.lower(), stem + ending.upper()]
    # a table beside the folder names it, too
    names.append(path.partition("/")[2] or path)
    names += [path + ending for ending in (*endings, *map(str.upper, endings))]
    similar = next((name for name in names if (root / name).is_file()), None)
    return (
        ""
        if similar is None
        else f"; there is {printable(similar)}: rows name images by their path below ROOT, to the letter"
    )


def _group_of(row: TableRow) -> str:
    return row.place if isinstance(row.image, SampleFailure) else row.image


def _entry_of(below: str, rows: Iterator[TableRow]) -> _Entry:
    """Return the entry of adjacent rows of one image."""
    first = next(rows)
    # one more than are allowed, so that too many are known as such
    others = itertools.islice(rows, MAX_CAPTIONS)
    captions = [*first.captions, *(caption for row in others for caption in row.captions)]
    place = posixpath.join(below, first.place)
    if isinstance(first.image, SampleFailure):
        return _Entry(place, None, failure=(first.image.kind, first.image.message))
    try:
        path = _path_below(below, first.image)
    except SampleFailure as failure:
        return _Entry(place, None, failure=(failure.kind, failure.message))
    return _Entry(path, path, tuple(captions), first.columns)


def _path_below(folder: str, name: str) -> str:
    """Return the path of a row's image below the root; raises SampleFailure where it leads elsewhere."""
    if "://" in name:
        message = f"{printable(name[:200])} is a URL; download images first, such as with img2dataset"
        raise SampleFailure("open", "image_is_url", message)
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or any(character < " " for character in name):
        message = f"{printable(name[:200])!r} is not a path of a file below the folder"
        raise SampleFailure("open", "unsafe_name", message)
    return posixpath.join(folder, *parts)


def _identity(entries: Iterator[_Entry]) -> tuple[str, int]:
    """Return a digest of all entries, and their number."""
    digest, count = hashlib.sha256(), 0
    for entry in entries:
        digest.update(repr(entry).encode("utf-8", "surrogatepass"))
        count += 1
    return digest.hexdigest()[:16], count


def _number(path: str) -> int:
    # digests, so that memory stays small however long the names are
    return int.from_bytes(_digest(path, 8))


def _digest(path: str, size_bytes: int) -> bytes:
    return hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=size_bytes).digest()
