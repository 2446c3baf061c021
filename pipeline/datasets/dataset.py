"""What every reader yields: images in a fixed order, each with its ground truth or why it has none."""

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

from pipeline.errors import SampleFailure, UserError
from pipeline.shards.image_files.png import check_png, png_without_texts
from pipeline.shards.images import open_image, upright_transpose
from pipeline.text import printable

BACKGROUND = 0
# in label maps as readers make them; written as 255 where the class ids leave room
IGNORED = 2**16 - 1
MAX_FILE_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 100_000_000
MAX_LIST_BYTES = 256 << 20
MAX_NAMES_LEFT_OUT, MAX_NAME_CHARACTERS = 100, 200

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
        image: the file's bytes, as its owner ships them.
        document: what the sample's JSON field holds.
        label_map: 0 background, class ids, `IGNORED`; in the frame of the upright image. None: no such truth.
    """

    image: bytes
    document: dict[str, Any]
    label_map: UInt16[np.ndarray, "height width"] | None


@dataclass(frozen=True)
class LeftOut:
    """Records of a dataset that no sample holds.

    Attributes:
        counts: how many of each kind.
        names: of each kind the first ones, with what is wrong, where that was told.
    """

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Count one record, and name it while its kind has few names."""
        self.counts[kind] += 1
        names = self.names.setdefault(kind, [])
        if len(names) < MAX_NAMES_LEFT_OUT:
            names.append(printable(name[:MAX_NAME_CHARACTERS]))


@dataclass(frozen=True)
class TruthDataset:
    """A split of a dataset, opened.

    Attributes:
        name: stem of its shards.
        class_names: of class ids 1, 2 and so on, as prompts need them.
        image_names: what the owner calls each image, in the order in which they are written.
        read: the sample of a name; raises SampleFailure, whose kind is the reason to leave the image out.
        left_out: records that no sample holds, by kind.
    """

    name: str
    class_names: tuple[str, ...]
    image_names: Sequence[str]
    read: Callable[[str], TruthSample]
    left_out: LeftOut = field(default_factory=LeftOut)


@dataclass(frozen=True)
class StoredImage:
    """An image file that decodes.

    Attributes:
        data: the file's bytes.
        height: rows as stored.
        width: columns as stored.
        transpose: what turns the stored frame upright.
    """

    data: bytes
    height: int
    width: int
    transpose: Image.Transpose | None

    def upright(self, label_map: UInt16[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h2 w2"]:
        """A label map, annotated on the image as stored or as displayed, in the frame of the upright image.

        Owners' own tools read images without regard to EXIF, so a size that fits both frames is taken to be
        of the stored one.

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
    """Read an image of the dataset and decode it once, so that no broken one is written.

    Raises:
        SampleFailure: kind `missing_image`, `unsafe_name`, `file_too_large`, or as `decode.open_image`.
    """
    data = read_file(folder, file_name, missing="missing_image")
    transpose = upright_transpose(data)
    upright = open_image(data, max_image_pixels=MAX_IMAGE_PIXELS)
    sides = (upright.height, upright.width)
    height, width = reversed(sides) if transpose in _SWAPS_SIDES else sides
    return StoredImage(data, height, width, transpose)


def read_file(folder: Path, file_name: str, *, missing: str) -> bytes:
    """The bytes of a file directly in a folder.

    Args:
        folder: of the dataset.
        file_name: from the dataset's lists; never trusted.
        missing: the failure's kind where there is no such file.

    Raises:
        SampleFailure: kind as `missing` says, `unsafe_name` or `file_too_large`.
    """
    path = folder / plain_name(file_name)
    try:
        if not path.is_file():
            raise SampleFailure("open", missing, f"no file {path}")
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            message = f"{path} has {size_bytes} bytes, allowed are {MAX_FILE_BYTES}"
            raise SampleFailure("open", "file_too_large", message)
        return path.read_bytes()
    except OSError as error:
        raise SampleFailure("open", "unreadable_file", f"{path}: {error.strerror}") from error


def plain_name(name: str) -> str:
    """The name, if it is one of a file in a folder; raises SampleFailure, kind `unsafe_name`, otherwise."""
    if name in ("", ".", "..") or any(character in "/\\:" or character < " " for character in name):
        raise SampleFailure("open", "unsafe_name", f"{name!r} is no name of a file")
    return name


def read_png(data: bytes, stored: StoredImage, modes: Collection[str]) -> np.ndarray:
    """The values of a PNG of the image's size: indices of a palette PNG, never its colours.

    Args:
        data: the PNG.
        stored: the image that it annotates; a PNG of another size is never decoded.
        modes: Pillow's names of what the dataset ships.

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
        return np.array(header)
    except SampleFailure as failure:
        if failure.stage == "read":
            raise
        raise SampleFailure("read", "bad_label_map", failure.message) from failure
    # decoders raise about any type on crafted bytes
    except Exception as error:
        raise SampleFailure("read", "bad_label_map", f"{type(error).__name__}: {error}") from error


def labelled_sample(
    stored: StoredImage,
    label_map: UInt16[np.ndarray, "h w"],
    class_names: Sequence[str],
    extra: dict[str, Any] | None = None,
) -> TruthSample:
    """The sample of an image with a label map; its classes are those that have at least one pixel.

    Raises:
        SampleFailure: kind `unknown_class` or `size_mismatch`.
    """
    upright = stored.upright(label_map)
    present = [int(value) for value in np.unique(upright) if value not in (BACKGROUND, IGNORED)]
    unknown = [class_id for class_id in present if class_id > len(class_names)]
    if unknown:
        message = f"the label map holds {unknown[:5]}, class ids go from 1 to {len(class_names)}"
        raise SampleFailure("read", "unknown_class", message)
    return TruthSample(stored.data, {**(extra or {}), **class_fields(present, class_names)}, upright)


def class_fields(
    class_ids: Sequence[int], class_names: Sequence[str], prompts: Sequence[str] | None = None
) -> dict[str, Any]:
    """What a sample's JSON says of its classes, each field aligned with ``class_ids``.

    Args:
        class_ids: of the classes in the image.
        class_names: of class ids 1, 2 and so on.
        prompts: what to prompt each class with, where that is not its name.
    """
    names = [class_names[class_id - 1] for class_id in class_ids]
    captions = names if prompts is None else [prompts[class_id - 1] for class_id in class_ids]
    return {"captions": captions, "class_ids": list(class_ids), "class_names": names, "labels": names}


def unique_names(names: Sequence[str], identities: Sequence[str]) -> tuple[str, ...]:
    """Names in one line each, where a name that came before, in any case, gets its identity in brackets.

    Args:
        names: of classes, in the order of their ids; an empty one is replaced by its identity.
        identities: the owner's own, which differ.
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
    """Class ids as readers pass them on; `IGNORED` where ``ignored``."""
    label_map = values.astype(np.uint16)
    if ignored is not None:
        label_map[ignored] = IGNORED
    return label_map


def read_list(path: Path) -> list[str]:
    """The lines of a text file of the dataset, without surrounding white space and empty ones.

    Raises:
        UserError: no such file, unreadable, too large or not UTF-8.
    """
    text = read_text(path)
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_text(path: Path, *, max_bytes: int = MAX_LIST_BYTES) -> str:
    """The text of a file of the dataset; raises UserError as `read_list`."""
    try:
        found = path.stat()
        # a pipe blocks, and a device never ends
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: is no regular file")
        if found.st_size > max_bytes:
            raise UserError(f"{path}: has {found.st_size} bytes, allowed are {max_bytes}")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is the dataset laid out as its owners ship it?") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def require_folder(path: Path, what: str) -> Path:
    """The path, if it is a folder; raises UserError, naming ``what`` was expected there, otherwise."""
    if not path.is_dir():
        raise UserError(f"{path}: expected a folder of {what}, found none")
    return path
