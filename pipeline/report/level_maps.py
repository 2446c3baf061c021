"""Maps from 0 to 1 as short texts, which the page's script reads (templates/maps.js)."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

# the slider's positions, hundredths, lie between two levels, so that each value stays on its side of them
STEPS = 200
# longest side of a map in pixels, best first
SIDES = (240, 200, 160, 128, 96, 64, 48, 32, 16)


@dataclass(frozen=True)
class LevelMap:
    """A map as a text.

    Attributes:
        text: base64 of zlib's compression of uint8, row-major: the differences, modulo 256, of each row of
            levels from the row above it. Level 0 is the value 0; level n is a value above (n - 1) / STEPS and
            up to n / STEPS, and is read as the middle of the two.
        height: of the map.
        width: of the map.
    """

    text: str
    height: int
    width: int

    def values(self) -> Float32[np.ndarray, "{self.height} {self.width}"]:
        """Return the values from 0 to 1 that the script reads."""
        differences = np.frombuffer(zlib.decompress(base64.b64decode(self.text)), np.uint8)
        levels = differences.reshape(self.height, self.width).cumsum(axis=0, dtype=np.uint8)
        values: np.ndarray = (levels - np.float32(0.5)).clip(0) / np.float32(STEPS)
        return values


def level_map(values: Float[np.ndarray, "height width"], max_bytes: int) -> LevelMap | None:
    """Encode a map at the largest size whose text fits a number of bytes.

    Args:
        values: from 0 to 1.
        max_bytes: of the text.

    Returns:
        The map; None if even the smallest size does not fit.
    """
    longest = max(values.shape)
    for side in [longest, *(side for side in SIDES if side < longest)]:
        encoded = _encoded(values if side == longest else _reduced(values, side / longest))
        if len(encoded.text) <= max_bytes:
            return encoded
    return None


def _encoded(values: Float[np.ndarray, "height width"]) -> LevelMap:
    levels: UInt8[np.ndarray, "height width"] = np.ceil(values.clip(0, 1) * STEPS).astype(np.uint8)
    differences = np.diff(levels, axis=0, prepend=np.zeros((1, levels.shape[1]), np.uint8))
    return LevelMap(base64.b64encode(zlib.compress(differences.tobytes(), 9)).decode(), *levels.shape)


def _reduced(values: Float[np.ndarray, "height width"], scale: float) -> Float32[np.ndarray, "rows columns"]:
    height, width = (max(1, round(length * scale)) for length in values.shape)
    image = Image.fromarray(np.ascontiguousarray(values, np.float32))
    reduced: np.ndarray = np.asarray(image.resize((width, height), Image.Resampling.BOX))
    return reduced
