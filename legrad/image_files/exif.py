"""EXIF: the orientation of an image, and how pixels are turned upright."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

TRANSPOSE_BY_ORIENTATION: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG, _SHORT = 0x0112, 3
_UPRIGHT: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


def upright_pixels(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels [height, width, channels] as stored upright, by an EXIF orientation from 1 to 8."""
    turn = _UPRIGHT.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def swaps_sides(orientation: int) -> bool:
    """Return whether an image of this EXIF orientation is stored with its height and width swapped."""
    return 5 <= orientation <= 8


def exif_orientation(exif: bytes) -> int:
    """Read the orientation, from 1 (upright) to 8; 1 where there is none or the EXIF data is corrupt.

    Pillow's own reader warns of corrupt data, which is no error here.

    Source: Exif 2.2, section 4.6.4, tag Orientation.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    byte_order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if byte_order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{byte_order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{byte_order}H", tiff, directory)
        for entry in range(entries):
            start = directory + 2 + 12 * entry
            tag, data_type, _, value = struct.unpack_from(f"{byte_order}HHIH", tiff, start)
            if tag == _ORIENTATION_TAG:
                return int(value) if data_type == _SHORT else 1
    except struct.error:
        return 1
    return 1
