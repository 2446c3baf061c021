"""Relevance grids in the columns `heatmap` and `context_heatmaps`: encode them and read them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32

# a grid is stored in so many steps of its peak; 8 bits, as earlier versions stored, move masks visibly
STEPS = 65535
STORED_TYPE = np.dtype("<u2")
EARLIER_STEPS = 255


def stored_bytes(relevance_grid: Float[np.ndarray, "grid_height grid_width"], peak: float) -> bytes:
    """Return a grid as it is stored: round(65535 grid/peak), uint16 little-endian, row-major.

    Args:
        relevance_grid: raw relevance, finite.
        peak: its maximum.
    """
    shares = np.clip(relevance_grid / (peak or 1.0), 0, 1)
    return np.rint(shares * STEPS).astype(STORED_TYPE).tobytes()


def stored_grid(heatmap: bytes, height: int, width: int) -> Float32[np.ndarray, "grid_height grid_width"]:
    """Return a stored grid as shares of its peak.

    Args:
        heatmap: content of the column, of this version or an earlier one, which stored uint8.
        height: rows of the grid.
        width: columns of the grid.

    Returns:
        float32 [height, width], from 0 to 1.

    Raises:
        ValueError: the content has another length.
    """
    if is_of_earlier_version(heatmap, height, width):
        levels, steps = np.frombuffer(heatmap, np.uint8), EARLIER_STEPS
    elif len(heatmap) == height * width * STORED_TYPE.itemsize:
        levels, steps = np.frombuffer(heatmap, STORED_TYPE), STEPS
    else:
        expected = f"{height * width} or {height * width * STORED_TYPE.itemsize}"
        raise ValueError(f"heatmap has {len(heatmap)} bytes; a grid of {height} x {width} has {expected}")
    grid: np.ndarray = levels.reshape(height, width).astype(np.float32) / np.float32(steps)
    return grid


def is_of_earlier_version(heatmap: bytes, height: int, width: int) -> bool:
    """Return whether a stored grid has 8 bits a value, as earlier versions wrote it."""
    return len(heatmap) == height * width
