"""Decode untrusted bytes of a sample to pixels at the model's input size; see `legrad.image_files.opener`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from legrad.canvases import Views, canvas_pixels, canvas_sizes
from legrad.errors import ImageFileError
from legrad.image_files import opener
from legrad.image_files.exif import (
    TRANSPOSE_BY_ORIENTATION,
    exif_orientation,
    swaps_sides,
    upright_pixels,
)
from legrad.image_files.jpeg import CheckedJpeg, check_jpeg
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
    with _faults_as_failures():
        stored = opener.stored_image(data, max_image_pixels)
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
    """Decode an image as `legrad.image_files.opener.open_image` does.

    Args:
        data: a file's content.
        max_image_pixels: larger images are refused before any pixel is decoded.

    Raises:
        SampleFailure: stage `decode`; its kind is that of `legrad.errors.ImageFileError`.
    """
    with _faults_as_failures():
        return opener.open_image(data, max_image_pixels=max_image_pixels)


def image_format(data: bytes, *, max_image_pixels: int) -> str:
    """Return JPEG, PNG, WEBP, BMP or GIF, by the headers of an image; no pixel is decoded.

    Args:
        data: a file's content.
        max_image_pixels: larger images are refused.

    Raises:
        SampleFailure: as `open_image`, as far as headers show it.
    """
    with _faults_as_failures():
        return str(opener.checked_header(data, max_image_pixels).format)


def _decode_jpeg_fast(
    data: bytes, stored: opener.StoredImage, transform: ImageTransform, views: Views, room: Room
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
        orientation = exif_orientation(opener.read_header(data).info.get("exif", b""))
        return TRANSPOSE_BY_ORIENTATION.get(orientation)


@contextmanager
def _faults_as_failures() -> Iterator[None]:
    try:
        with opener.faults_as_errors():
            yield
    except ImageFileError as error:
        raise SampleFailure("decode", error.kind, str(error)) from error
