"""Decode untrusted files of images: formats from a list, bounded in pixels, damaged ones refused.

The format of an image is recognised by its first bytes alone; the name of the file does not matter. Formats
that are opened are JPEG, PNG, WebP, BMP and GIF, with a single frame; TIFF is not: its decoders are large.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from legrad.errors import ImageFileError
from legrad.image_files.bmp import check_bmp
from legrad.image_files.exif import TRANSPOSE_BY_ORIENTATION, exif_orientation, swaps_sides
from legrad.image_files.jpeg import CheckedJpeg
from legrad.image_files.levels import MODES_OF_8_BITS, high_bytes
from legrad.image_files.png import check_png, check_png_palette, check_png_rows, png_without_texts
from legrad.image_files.webp import check_webp, check_webp_length

# Pillow reads the parts of a file (segments, chunks, blocks) one by one in Python, metadata included
MAX_READS = 2**18
# the longest side of a JPEG; Pillow keeps a pointer and a step of resizing for each row
MAX_IMAGE_SIDE = 2**16 - 1
# Pillow joins the segments one by one, in quadratic time; a picture has one, and so has each further picture
MAX_EXIF_SEGMENTS = 64


def open_image(data: bytes, *, max_image_pixels: int) -> Image.Image:
    """Decode an image completely, upright, in a mode that Pillow converts to RGB.

    Palette, alpha and CMYK images keep their mode, since open_clip resamples before it converts. 16-bit grey
    becomes 8-bit grey by its high byte, which is also how Pillow reads 16-bit colour.

    Args:
        data: a file's content.
        max_image_pixels: larger images are refused before any pixel is decoded.

    Raises:
        ImageFileError: the file holds no image that is read, or a damaged one.
    """
    with faults_as_errors():
        return stored_image(data, max_image_pixels).load()


def stored_image(data: bytes, max_image_pixels: int) -> StoredImage:
    """Check the headers of an image, and its file for damage, before pixels are decoded; see `open_image`."""
    with faults_as_errors():
        header = checked_header(data, max_image_pixels)
        _check_soundness(header, data)
        return StoredImage(header, exif_orientation(header.info.get("exif", b"")))


@dataclass(frozen=True)
class StoredImage:
    """A file whose headers were checked, before its pixels are decoded.

    Attributes:
        header: Pillow's reader of the file.
        orientation: by its EXIF data, from 1 (upright) to 8.
    """

    header: ImageFile
    orientation: int

    @property
    def height(self) -> int:
        """Rows of the upright image."""
        return self.header.width if swaps_sides(self.orientation) else self.header.height

    @property
    def width(self) -> int:
        """Columns of the upright image."""
        return self.header.height if swaps_sides(self.orientation) else self.header.width

    def load(self) -> Image.Image:
        """Decode the pixels by Pillow, upright; see `open_image`."""
        self.header.load()
        image = _as_convertible(self.header)
        transpose = TRANSPOSE_BY_ORIENTATION.get(self.orientation)
        return image if transpose is None else image.transpose(transpose)


class _BoundedReader(io.BytesIO):
    """A file in memory that may be read a limited number of times, since each of its parts costs a read."""

    _reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise ImageFileError("too_many_parts", f"the image has more parts than the limit of {MAX_READS}")
        return super().read(size)


def checked_header(data: bytes, max_image_pixels: int) -> ImageFile:
    """Return Pillow's reader of an image of one frame and at most so many pixels; no pixel is decoded."""
    header = read_header(data)
    _check_size(header, max_image_pixels)
    if getattr(header, "is_animated", False):
        raise ImageFileError("animated", "the image has several frames; only images of one frame are read")
    return header


def _check_size(header: ImageFile, max_image_pixels: int) -> None:
    size = f"the image has {header.width} x {header.height} pixels"
    if header.width * header.height > max_image_pixels:
        raise ImageFileError("too_many_pixels", f"{size}; the limit is {max_image_pixels} pixels")
    if max(header.size) > MAX_IMAGE_SIDE:
        raise ImageFileError("side_too_long", f"{size}; the limit of a side is {MAX_IMAGE_SIDE} pixels")


def _check_exif_segments(data: bytes) -> None:
    if data.count(b"Exif\0\0") > MAX_EXIF_SEGMENTS:
        message = f"the JPEG has more segments of EXIF data than the limit of {MAX_EXIF_SEGMENTS}"
        raise ImageFileError("too_many_parts", message)


def _check_soundness(header: ImageFile, data: bytes) -> None:
    """Refuse a damaged file; `CheckedJpeg` does so itself while it decodes."""
    if isinstance(header, PngImageFile):
        check_png(data)
        check_png_palette(data)
        check_png_rows(data)
    elif isinstance(header, WebPImageFile):
        check_webp(data, header.width * header.height)
    elif isinstance(header, BmpImageFile):
        check_bmp(data)


def read_header(data: bytes) -> ImageFile:
    """Return Pillow's reader of an image, by the first bytes of its file."""
    # The classes of the formats rather than Image.open, whose limit on pixels is global and only warns.
    if not data:
        raise ImageFileError("empty", "the image has no bytes")
    reader = _reader_of(data)
    if reader is None:
        message = f"expected a JPEG, PNG, WebP, BMP or GIF, received bytes that begin with {data[:12]!r}"
        raise ImageFileError("format_not_allowed", message)
    if reader is CheckedJpeg:
        _check_exif_segments(data)
    if reader is WebPImageFile:
        check_webp_length(data)
    return reader(_BoundedReader(png_without_texts(data) if reader is PngImageFile else data))


def _reader_of(data: bytes) -> Callable[[io.BytesIO], ImageFile] | None:
    if data.startswith(b"\xff\xd8\xff"):
        return CheckedJpeg
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile
    if data.startswith(b"BM"):
        return BmpImageFile
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile
    return None


def _as_convertible(image: Image.Image) -> Image.Image:
    # Transparency never reaches RGB, but Pillow would warn of it there.
    image.info.pop("transparency", None)
    if image.mode in MODES_OF_8_BITS:
        return image
    # of the formats opened, only PNG has grey of more than 8 bits, and never more than 16
    if image.mode == "I" or image.mode.startswith("I;16"):
        return high_bytes(image)
    raise ImageFileError("unsupported_mode", f"the image mode {image.mode} has no defined conversion to RGB")


@contextmanager
def faults_as_errors() -> Iterator[None]:
    """Convert whatever a decoder raises to an ImageFileError; MemoryError passes."""
    try:
        yield
    except (ImageFileError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageFileError("too_many_pixels", str(error)) from error
    # Decoders raise almost any type of exception on crafted bytes.
    except Exception as error:
        is_cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        message = f"{type(error).__name__}: {error}"
        raise ImageFileError("truncated" if is_cut else "unreadable", message) from error
