"""What all readers have in common: the dataset that they return, and how its files are read."""

from __future__ import annotations

import io
import stat
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt16
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from legrad.errors import ImageFileError
from legrad.image_files.png import check_png, check_png_rows, png_without_texts
from pipeline.errors import SampleFailure, UserError
from pipeline.shards.images import open_image, upright_transpose
from pipeline.text import printable

BACKGROUND = 0
# in label maps in memory; written as 255 if the class ids are below it
IGNORED = 2**16 - 1
MAX_FILE_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 100_000_000
MAX_LIST_BYTES = 256 << 20
MAX_NAMES_OF_A_KIND, MAX_NAME_CHARACTERS = 100, 200

_SWAPS_SIDES = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_270,
)


@dataclass(frozen=True)
class TruthSample:
    """One image with its ground truth.

    Attributes:
        image: the unchanged bytes of the image file.
        document: content of the sample's JSON field.
        label_map: 0 for background, class ids, `IGNORED`; in the frame of the upright image. None: there is
            none.
    """

    image: bytes
    document: dict[str, Any]
    label_map: UInt16[np.ndarray, "height width"] | None


@dataclass(frozen=True)
class SkippedRecords:
    """Records of a dataset that are in no sample.

    Attributes:
        counts: number of records of each kind.
        names: the first records of each kind, with what is wrong with them.
    """

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Count a record, and keep its name if it is among the first of its kind."""
        self.counts[kind] += 1
        names = self.names.setdefault(kind, [])
        if len(names) < MAX_NAMES_OF_A_KIND:
            names.append(printable(name[:MAX_NAME_CHARACTERS]))


@dataclass(frozen=True)
class TruthDataset:
    """An open split of a dataset.

    Attributes:
        name: stem of the names of its shards.
        class_names: names of class ids 1, 2 and so on, as prompts need them.
        image_names: the owner's names of the images, in the order in which they are written.
        read: returns the sample of a name; raises SampleFailure, whose kind is the reason to skip the image.
        skipped: records that are in no sample.
    """

    name: str
    class_names: tuple[str, ...]
    image_names: Sequence[str]
    read: Callable[[str], TruthSample]
    skipped: SkippedRecords = field(default_factory=SkippedRecords)


@dataclass(frozen=True)
class StoredImage:
    """An image file that can be decoded.

    Attributes:
        data: bytes of the file.
        height: number of rows as stored.
        width: number of columns as stored.
        transpose: turns the stored image upright; None: it is upright.
    """

    data: bytes
    height: int
    width: int
    transpose: Image.Transpose | None

    def upright(self, label_map: UInt16[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h2 w2"]:
        """Return a label map of the image as stored or as displayed in the frame of the upright image.

        The owners' tools ignore EXIF, so a size that fits both frames is taken for that of the stored image.

        Raises:
            SampleFailure: kind `size_mismatch`.
        """
        if label_map.shape == (self.height, self.width):
            if self.transpose is None:
                return label_map
            return np.asarray(Image.fromarray(label_map).transpose(self.transpose), dtype=np.uint16)
        if self.transpose in _SWAPS_SIDES and label_map.shape == (self.width, self.height):
            return label_map
        sizes = f"{label_map.shape[1]} x {label_map.shape[0]}, the image {self.width} x {self.height}"
        raise SampleFailure("read", "size_mismatch", f"the label map has {sizes} pixels")


def read_image(folder: Path, file_name: str) -> StoredImage:
    """Read an image of the dataset and decode it, so that no broken image is written.

    Raises:
        SampleFailure: of a kind of `read_file`, with `missing_image`, or of `open_image`.
    """
    data = read_file(folder, file_name, missing="missing_image")
    transpose = upright_transpose(data)
    upright = open_image(data, max_image_pixels=MAX_IMAGE_PIXELS)
    sides = (upright.height, upright.width)
    height, width = reversed(sides) if transpose in _SWAPS_SIDES else sides
    return StoredImage(data, height, width, transpose)


def read_file(folder: Path, file_name: str, *, missing: str) -> bytes:
    """Return the bytes of a file in a folder.

    Args:
        folder: a folder of the dataset.
        file_name: a name from the lists of the dataset, which is not trusted.
        missing: kind of the failure if there is no such file.

    Raises:
        SampleFailure: of kind `missing`, `unsafe_name`, `file_too_large` or `unreadable_file`.
    """
    return read_path(folder / plain_name(file_name), missing=missing)


def read_path(path: Path, *, missing: str) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        SampleFailure: of kind `missing`, `file_too_large` or `unreadable_file`.
    """
    try:
        if not path.is_file():
            raise SampleFailure("open", missing, f"no file {path}")
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            message = f"{path} has {size_bytes} bytes; the limit is {MAX_FILE_BYTES}"
            raise SampleFailure("open", "file_too_large", message)
        return path.read_bytes()
    except OSError as error:
        raise SampleFailure("open", "unreadable_file", f"{path}: {error.strerror}") from error


def plain_name(name: str) -> str:
    """Return the name of a file in a folder; raise SampleFailure, kind `unsafe_name`, for any other name."""
    if name in ("", ".", "..") or any(character in "/\\:" or character < " " for character in name):
        raise SampleFailure("open", "unsafe_name", f"{name!r} is not the name of a file")
    return name


def read_png(data: bytes, stored: StoredImage, modes: Collection[str]) -> np.ndarray:
    """Return the values of a PNG of the image's size: the indices of a palette PNG, not its colours.

    Args:
        data: bytes of the PNG.
        stored: the image that it annotates; a PNG of another size is not decoded.
        modes: Pillow's names of the modes that the dataset uses.

    Raises:
        SampleFailure: kind `bad_label_map` or `size_mismatch`.
    """
    try:
        header = PngImageFile(io.BytesIO(png_without_texts(data)))
        if sorted(header.size) != sorted((stored.height, stored.width)):
            sizes = f"{header.width} x {header.height}, the image {stored.width} x {stored.height}"
            raise SampleFailure("read", "size_mismatch", f"the label map has {sizes} pixels")
        if header.mode not in modes:
            message = f"expected a PNG of mode {' or '.join(modes)}, received {header.mode}"
            raise SampleFailure("read", "bad_label_map", message)
        check_png(data)
        check_png_rows(data)
        return np.array(header)
    except SampleFailure:
        raise
    except ImageFileError as error:
        raise SampleFailure("read", "bad_label_map", str(error)) from error
    # decoders may raise any type on crafted bytes
    except Exception as error:
        raise SampleFailure("read", "bad_label_map", f"{type(error).__name__}: {error}") from error


def labelled_sample(
    stored: StoredImage,
    label_map: UInt16[np.ndarray, "h w"],
    class_names: Sequence[str],
    extra: dict[str, Any] | None = None,
) -> TruthSample:
    """Return the sample of an image with a label map; its classes are those with at least one pixel.

    Raises:
        SampleFailure: kind `unknown_class` or `size_mismatch`.
    """
    upright = stored.upright(label_map)
    present = [int(value) for value in np.unique(upright) if value not in (BACKGROUND, IGNORED)]
    unknown = [class_id for class_id in present if class_id > len(class_names)]
    if unknown:
        message = f"the label map has class {unknown[0]}; class ids go from 1 to {len(class_names)}"
        raise SampleFailure("read", "unknown_class", message)
    return TruthSample(stored.data, {**(extra or {}), **class_fields(present, class_names)}, upright)


def class_fields(
    class_ids: Sequence[int], class_names: Sequence[str], prompts: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the fields of a sample's JSON on its classes, each aligned with ``class_ids``.

    Args:
        class_ids: the classes in the image.
        class_names: names of class ids 1, 2 and so on.
        prompts: prompts of class ids 1, 2 and so on; None: the names.
    """
    names = [class_names[class_id - 1] for class_id in class_ids]
    captions = names if prompts is None else [prompts[class_id - 1] for class_id in class_ids]
    return {"captions": captions, "class_ids": list(class_ids), "class_names": names, "labels": names}


def unique_names(names: Sequence[str], identities: Sequence[str]) -> tuple[str, ...]:
    """Return names of one line each; a repeated name, in any case, gets its identity in brackets.

    Args:
        names: names of classes, in the order of their ids; an empty one is replaced by its identity.
        identities: the owner's identities of the classes, all different.
    """
    taken: set[str] = set()
    unique = []
    for name, identity in zip(names, identities, strict=True):
        plain = " ".join(name.split()) or identity
        # a name may look like one with its identity already
        while plain.casefold() in taken:
            plain = f"{plain} ({identity})"
        unique.append(plain)
        taken.add(plain.casefold())
    return tuple(unique)


def as_label_map(
    values: np.ndarray, ignored: Bool[np.ndarray, "h w"] | None = None
) -> UInt16[np.ndarray, "h w"]:
    """Return a label map of class ids, with `IGNORED` where ``ignored`` is true."""
    label_map = values.astype(np.uint16)
    if ignored is not None:
        label_map[ignored] = IGNORED
    return label_map


def read_list(path: Path) -> list[str]:
    """Return the lines of a text file of the dataset, stripped, without the empty ones.

    Raises:
        UserError: the file does not exist, cannot be read, is too large, or is not UTF-8.
    """
    text = read_text(path)
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_text(path: Path, *, max_bytes: int = MAX_LIST_BYTES) -> str:
    """Return the text of a file of the dataset; raise UserError as `read_list`."""
    try:
        found = path.stat()
        # a pipe blocks, and a device never ends
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: is not a regular file")
        if found.st_size > max_bytes:
            raise UserError(f"{path}: has {found.st_size} bytes; the limit is {max_bytes}")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the dataset must be laid out as its owners ship it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def require_folder(path: Path, what: str) -> Path:
    """Return the path of a folder; raise UserError, naming ``what`` is expected in it, if there is none."""
    if not path.is_dir():
        problem = "is a file" if path.exists() else "no such folder"
        raise UserError(f"{path}: {problem}; expected a folder of {what}")
    return path
