"""Decode untrusted bytes to pixels at the model's input size.

The format of an image is recognised by its first bytes alone; the name of its field does not matter. Formats
that are opened are JPEG, PNG, WebP, BMP and GIF, with a single frame; TIFF is not, since its decoders are
large.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from legrad.canvases import Views, canvas_pixels, canvas_sizes
from legrad.images import ImageTransform, Resize, fast_resize
from pipeline.errors import SampleFailure
from pipeline.shards.decode_memory import (
    Room,
    bytes_by_pillow,
    bytes_by_simplejpeg,
    no_limit,
    room_for,
)
from pipeline.shards.fast_jpeg import DECODED_MODES, decode_jpeg, reduction_of
from pipeline.shards.image_files.bmp import check_bmp
from pipeline.shards.image_files.exif import (
    TRANSPOSE_BY_ORIENTATION,
    exif_orientation,
    swaps_sides,
    upright_pixels,
)
from pipeline.shards.image_files.jpeg import CheckedJpeg, check_jpeg
from pipeline.shards.image_files.png import (
    check_png,
    check_png_palette,
    check_png_rows,
    png_without_texts,
)
from pipeline.shards.image_files.webp import check_webp, check_webp_length

# Pillow reads the parts of a file (segments, chunks, blocks) one by one in Python, metadata included
MAX_READS = 2**18
# the longest side of a JPEG; Pillow keeps a pointer and a step of resizing for each row
MAX_IMAGE_SIDE = 2**16 - 1
# Pillow joins the segments one by one, in quadratic time; a picture has one, and so has each further picture
MAX_EXIF_SEGMENTS = 64

_MODES_CONVERTIBLE_TO_RGB = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")


@dataclass(frozen=True)
class DecodedImage:
    """An image as the model takes it, and the size it came in.

    Attributes:
        image_height: rows of the original, after EXIF orientation.
        image_width: columns of the original, after EXIF orientation.
        canvases: the image resized for each canvas of `legrad.views`, RGB, uint8 [height, width, 3] each, the
            first one at the model's input size.
    """

    image_height: int
    image_width: int
    canvases: tuple[np.ndarray, ...]

    @property
    def pixels(self) -> np.ndarray:
        """Pixels at the model's input size."""
        return self.canvases[0]


WHOLE_IMAGE = Views()


def decode_image(
    data: bytes,
    transform: ImageTransform,
    *,
    max_image_pixels: int,
    views: Views = WHOLE_IMAGE,
    resize: Resize = "exact",
    room: Room = no_limit,
) -> DecodedImage:
    """Decode an image and resize it to each of its canvases.

    Args:
        data: a file's content.
        transform: the model's own.
        max_image_pixels: larger images are refused before any pixel is decoded.
        views: views of the image, which decide its canvases.
        resize: "exact": bit for bit as open_clip's own transform does; "fast": JPEGs by simplejpeg, at a half
            or less of their size where that leaves twice the canvas, and resized in whole numbers; see
            `legrad.LeGrad.preprocess`. Damaged files fail alike in both.
        room: asked for memory before an image is decoded that takes more than LARGE_IMAGE_BYTES.

    Raises:
        SampleFailure: as `open_image`.
    """
    stored = _opened(data, max_image_pixels)
    if resize == "fast" and (decoded := _decode_jpeg_fast(data, stored, transform, views, room)) is not None:
        return decoded
    with _faults_as_failures():
        sizes = canvas_sizes(views, transform, stored.height, stored.width)
        needed_bytes = bytes_by_pillow(
            stored.header, data, sizes, is_turned=stored.orientation != 1, resize=resize
        )
    with room_for(needed_bytes, room), _faults_as_failures():
        image = stored.load()
        return DecodedImage(image.height, image.width, canvas_pixels(views, transform, image, resize))


def open_image(data: bytes, *, max_image_pixels: int) -> Image.Image:
    """Decode an image completely, upright, in a mode that Pillow converts to RGB.

    Palette, alpha and CMYK images keep their mode, since open_clip resamples before it converts. 16-bit grey
    becomes 8-bit grey by its high byte, which is also how Pillow reads 16-bit colour.

    Args:
        data: a file's content.
        max_image_pixels: larger images are refused before any pixel is decoded.

    Raises:
        SampleFailure: stage `decode`; kind `empty`, `format_not_allowed`, `too_many_pixels`, `side_too_long`,
            `too_many_parts`, `animated`, `unsupported_mode`, `truncated`, `corrupt` (checks find the file
            damaged) or `unreadable` (its decoder raises).
    """
    stored = _opened(data, max_image_pixels)
    with _faults_as_failures():
        return stored.load()


def image_format(data: bytes, *, max_image_pixels: int) -> str:
    """Return JPEG, PNG, WEBP, BMP or GIF, by the headers of an image; no pixel is decoded.

    Args:
        data: a file's content.
        max_image_pixels: larger images are refused.

    Raises:
        SampleFailure: as `open_image`, as far as headers show it.
    """
    with _faults_as_failures():
        return str(_checked_header(data, max_image_pixels).format)


@dataclass(frozen=True)
class _StoredImage:
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


def _opened(data: bytes, max_image_pixels: int) -> _StoredImage:
    with _faults_as_failures():
        header = _checked_header(data, max_image_pixels)
        _check_soundness(header, data)
        return _StoredImage(header, exif_orientation(header.info.get("exif", b"")))


def _decode_jpeg_fast(
    data: bytes, stored: _StoredImage, transform: ImageTransform, views: Views, room: Room
) -> DecodedImage | None:
    """Return None for other formats and colours, and where Pillow decides whether a file is damaged."""
    header = stored.header
    # no tile: Pillow found no data to decode
    if not isinstance(header, CheckedJpeg) or header.mode not in DECODED_MODES or not header.tile:
        return None
    with _faults_as_failures():
        is_read_at_once = check_jpeg(data) is not None
        sizes = canvas_sizes(views, transform, stored.height, stored.width)
        # turning small pixels is cheaper than turning large ones
        if swaps_sides(stored.orientation):
            sizes = tuple((width, height) for height, width in sizes)
        reduction = reduction_of(header.height, header.width, sizes)
        needed_bytes = bytes_by_simplejpeg(header, sizes, reduction, is_read_at_once=is_read_at_once)
    with room_for(needed_bytes, room), _faults_as_failures():
        pixels = decode_jpeg(data, header.height, header.width, reduction)
        if pixels is None:
            return None
        extent = (header.height / reduction, header.width / reduction)
        canvases = (fast_resize(pixels, *size, transform.interpolation, extent=extent) for size in sizes)
        upright = tuple(upright_pixels(canvas, stored.orientation) for canvas in canvases)
    return DecodedImage(stored.height, stored.width, upright)


def upright_transpose(data: bytes) -> Image.Transpose | None:
    """Return the operation that turns an image as stored upright, by its EXIF data; None where it is upright.

    Raises:
        SampleFailure: as `open_image`.
    """
    with _faults_as_failures():
        orientation = exif_orientation(_read_header(data).info.get("exif", b""))
        return TRANSPOSE_BY_ORIENTATION.get(orientation)


class _BoundedReader(io.BytesIO):
    """A file in memory that may be read a limited number of times, since each of its parts costs a read."""

    _reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise SampleFailure(
                "decode", "too_many_parts", f"the image has more parts than the limit of {MAX_READS}"
            )
        return super().read(size)


def _checked_header(data: bytes, max_image_pixels: int) -> ImageFile:
    header = _read_header(data)
    _check_size(header, max_image_pixels)
    if getattr(header, "is_animated", False):
        raise SampleFailure(
            "decode", "animated", "the image has several frames; only images of one frame are read"
        )
    return header


def _check_size(header: ImageFile, max_image_pixels: int) -> None:
    size = f"the image has {header.width} x {header.height} pixels"
    if header.width * header.height > max_image_pixels:
        raise SampleFailure("decode", "too_many_pixels", f"{size}; the limit is {max_image_pixels} pixels")
    if max(header.size) > MAX_IMAGE_SIDE:
        raise SampleFailure(
            "decode", "side_too_long", f"{size}; the limit of a side is {MAX_IMAGE_SIDE} pixels"
        )


def _check_exif_segments(data: bytes) -> None:
    if data.count(b"Exif\0\0") > MAX_EXIF_SEGMENTS:
        message = f"the JPEG has more segments of EXIF data than the limit of {MAX_EXIF_SEGMENTS}"
        raise SampleFailure("decode", "too_many_parts", message)


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


def _read_header(data: bytes) -> ImageFile:
    # The classes of the formats rather than Image.open, whose limit on pixels is global and only warns.
    if not data:
        raise SampleFailure("decode", "empty", "the image has no bytes")
    reader = _reader_of(data)
    if reader is None:
        message = f"expected a JPEG, PNG, WebP, BMP or GIF, received bytes that begin with {data[:12]!r}"
        raise SampleFailure("decode", "format_not_allowed", message)
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
    if image.mode in _MODES_CONVERTIBLE_TO_RGB:
        return image
    # of the formats opened, only PNG has grey of more than 8 bits, and never more than 16
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    raise SampleFailure(
        "decode", "unsupported_mode", f"the image mode {image.mode} has no defined conversion to RGB"
    )


@contextmanager
def _faults_as_failures() -> Iterator[None]:
    try:
        yield
    except (SampleFailure, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise SampleFailure("decode", "too_many_pixels", str(error)) from error
    # Decoders raise almost any type of exception on crafted bytes, and none may fail more than the sample.
    except Exception as error:
        is_cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        message = f"{type(error).__name__}: {error}"
        raise SampleFailure("decode", "truncated" if is_cut else "unreadable", message) from error
