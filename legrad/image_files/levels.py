"""Scale images of more than 8 bits to 8 bits; Pillow's own conversions would clip them to white."""

from __future__ import annotations

import numpy as np
from PIL import Image

from legrad.errors import InputError

# Modes whose conversion to RGB by Pillow is defined and clips nothing.
MODES_OF_8_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
# Pillow converts these as well, but no file that is opened here has them.
OTHER_MODES_OF_8_BITS = ("La", "RGBX", "RGBa", "YCbCr", "HSV")
_LEVELS, _LEVELS_OF_16_BITS = 255, 65535


def high_bytes(image: Image.Image) -> Image.Image:
    """Return 16-bit grey as 8-bit grey, by its high byte; this is also how Pillow reads 16-bit colour."""
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def as_8_bits(image: Image.Image) -> Image.Image:
    """Return an image in a mode that Pillow converts to RGB without clipping; grey stays grey.

    Mode `I;16`, of 16 bits, is scaled by its high byte. Modes `I` and `F` have no range of their own: the
    smallest of these that holds all values is taken for it: from 0 to 1 (`F` only), to 255, to 65535.

    Raises:
        InputError: the mode has no conversion to RGB, or values are negative, above 65535, or not finite.
    """
    if image.mode in MODES_OF_8_BITS or image.mode in OTHER_MODES_OF_8_BITS:
        return image
    if image.mode.startswith("I;16"):
        return high_bytes(image)
    if image.mode in ("I", "F"):
        return Image.fromarray(_scaled(np.asarray(image), image.mode))
    raise InputError(
        f"image mode {image.mode} has no defined conversion to RGB; convert the image to RGB first"
    )


def _scaled(values: np.ndarray, mode: str) -> np.ndarray:
    if not values.size:
        return values.astype(np.uint8)
    lowest, highest = values.min(), values.max()
    if not np.isfinite(values).all():
        raise InputError(f"image of mode {mode} has NaN or infinite pixels")
    if lowest < 0 or highest > _LEVELS_OF_16_BITS:
        raise InputError(
            f"image of mode {mode} has values from {lowest:g} to {highest:g}; expected 0 to 255 (8 bits) or "
            "0 to 65535 (16 bits)"
        )
    if highest > _LEVELS:
        high_bytes: np.ndarray = (values.astype(np.int32) >> 8).astype(np.uint8)
        return high_bytes
    levels: np.ndarray = values * _LEVELS if mode == "F" and highest <= 1 else values
    nearest: np.ndarray = np.rint(levels).astype(np.uint8)
    return nearest
