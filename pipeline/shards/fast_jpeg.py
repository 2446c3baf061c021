"""Decode JPEGs with libjpeg-turbo's own interface, large ones at a fraction of their size.

Pixels at full size equal Pillow's. libjpeg-turbo computes a half, a quarter and an eighth with vector
instructions; other fractions take longer than the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import simplejpeg

# modes of Pillow whose colours libjpeg-turbo converts to RGB as Pillow does
DECODED_MODES = ("RGB", "L")
REDUCTIONS = (8, 4, 2)
# a reduced image has at least so many pixels for each pixel of a canvas, along each side
LEAST_OVERSAMPLING = 2


def reduction_of(height: int, width: int, canvas_sizes: Sequence[tuple[int, int]]) -> int:
    """Return by how much an image may be reduced while it is decoded: 8, 4, 2 or 1.

    Args:
        height: of the image as stored, in pixels.
        width: of the image as stored, in pixels.
        canvas_sizes: (height, width) of what it will be resized to.
    """
    least_height, least_width = (LEAST_OVERSAMPLING * max(side) for side in zip(*canvas_sizes, strict=True))
    for reduction in REDUCTIONS:
        if height >= reduction * least_height and width >= reduction * least_width:
            return reduction
    return 1


def decode_jpeg(data: bytes, height: int, width: int, reduction: int) -> np.ndarray | None:
    """Decode a JPEG to RGB, as stored.

    Args:
        data: a file's content.
        height: by its header.
        width: by its header.
        reduction: one of `reduction_of`.

    Returns:
        uint8 [height, width, 3], each side divided by the reduction and rounded up. None for files that
        libjpeg-turbo refuses or warns of: Pillow passes over some warnings.
    """
    reduced = (-(-height // reduction), -(-width // reduction))
    least = reduced if reduction > 1 else (0, 0)
    try:
        # before memory is taken, in case that two readers of one header find two sizes
        if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):
            return None
        pixels = simplejpeg.decode_jpeg(data, min_height=least[0], min_width=least[1], strict=True)
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == reduced else None
