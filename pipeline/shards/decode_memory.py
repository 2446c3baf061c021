"""How much memory decoding an image takes, and who is asked for it.

Estimates are upper bounds of what the peak of resident memory grows by;
tests/pipeline/test_decode_memory.py holds them against processes that decode such files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.WebPImagePlugin import WebPImageFile

from legrad.images import Resize

# room is asked for images that take more than this to decode
LARGE_IMAGE_BYTES = 32 * 2**20

# Given a number of bytes, returns a context that is entered once so much memory is free, and holds it.
Room = Callable[[int], AbstractContextManager[object]]

# of Pillow's own images, a pixel; all other modes take four
_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}
# Fast resizing, a pixel: Pillow hands out bytes in pieces and joins them, from which an array is copied, of
# which at most two exist at a time; grey is resized as four channels.
_FAST_RESIZING_BYTES = {"RGB": 6, "L": 5}
# libwebp, a pixel: two canvases that live as long as the file is open, and one that is handed out
_WEBP_KEPT_BYTES, _WEBP_BYTES = 8, 4
# from 16 bits to 8, a pixel: copies of two bytes, and of the high one
_HIGH_BYTE_BYTES = 8
_COEFFICIENT_BYTES = 2
# tables of weights, rows that decoders hold back, and what the allocator rounds up
_SPARE_BYTES = 4 * 2**20
_START_OF_SCAN = b"\xff\xda"


def no_limit(_needed_bytes: int) -> AbstractContextManager[object]:
    """Return a context that waits for nothing."""
    return nullcontext()


def room_for(needed_bytes: int, room: Room) -> AbstractContextManager[object]:
    """Return the context in which an image is decoded that takes so much memory."""
    return room(needed_bytes) if needed_bytes > LARGE_IMAGE_BYTES else nullcontext()


def bytes_by_pillow(
    header: ImageFile,
    data: bytes,
    canvas_sizes: Sequence[tuple[int, int]],
    *,
    is_turned: bool,
    resize: Resize,
) -> int:
    """Return how much memory it takes to decode an image by Pillow, and to resize it.

    Args:
        header: of the file.
        data: the file's content, of which some readers keep a copy.
        canvas_sizes: (height, width) of what it is resized to.
        is_turned: whether its EXIF orientation is another than upright.
        resize: how it is resized.
    """
    pixels, pixel_bytes = header.width * header.height, _STORED_BYTES.get(header.mode, 4)
    stored = pixels * pixel_bytes
    resizing = _widest_pass(max(header.size), canvas_sizes, pixel_bytes)
    if header.mode in ("LA", "RGBA"):
        resizing += stored
    elif resize == "fast":
        resizing += pixels * _FAST_RESIZING_BYTES.get(header.mode, 0)
    turned = stored if is_turned else 0
    kept = _WEBP_KEPT_BYTES * pixels if isinstance(header, WebPImageFile) else 0
    return stored + kept + max(_decoder_bytes(header, data), turned + resizing) + len(data) + _SPARE_BYTES


def bytes_by_simplejpeg(
    header: JpegImageFile, canvas_sizes: Sequence[tuple[int, int]], reduction: int, *, is_read_at_once: bool
) -> int:
    """Return how much memory it takes to decode a JPEG by simplejpeg, and to resize it.

    Args:
        header: of the file.
        canvas_sizes: (height, width) of what it is resized to, as stored.
        reduction: by how much each side is reduced while it is decoded.
        is_read_at_once: whether its data are one scan; all coefficients of others are kept.
    """
    height, width = (-(-side // reduction) for side in (header.height, header.width))
    coefficients = 0 if is_read_at_once else _coefficient_bytes(header)
    return 3 * height * width + max(coefficients, _widest_pass(height, canvas_sizes, 4)) + _SPARE_BYTES


def _widest_pass(rows: int, canvas_sizes: Sequence[tuple[int, int]], pixel_bytes: int) -> int:
    """Return the size of what the first of two passes of resizing leaves to the second one."""
    return rows * max(width for _, width in canvas_sizes) * pixel_bytes


def _decoder_bytes(header: ImageFile, data: bytes) -> int:
    pixels = header.width * header.height
    if isinstance(header, JpegImageFile):
        return _coefficient_bytes(header) if data.count(_START_OF_SCAN) > 1 else 0
    if isinstance(header, WebPImageFile):
        return _WEBP_BYTES * pixels
    return _HIGH_BYTE_BYTES * pixels if header.mode.startswith("I") else 0


def _coefficient_bytes(header: JpegImageFile) -> int:
    """Return the size of all coefficients of a JPEG, each component at its own resolution."""
    factors = [(across, down) for _, across, down, _ in header.layer]
    most = max((across for across, _ in factors), default=0) * max((down for _, down in factors), default=0)
    # factors of damaged files may be zero
    shares = sum(across * down for across, down in factors) / max(1, most)
    return int(_COEFFICIENT_BYTES * header.width * header.height * shares)
