"""Smooth relevance grids with a Gaussian, before they are compared, normalised or refined."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from legrad.memory import uploaded


def smoothed_grids(
    relevance_grids: Float[Tensor, "*leading grid_height grid_width"], sigma_cells: float
) -> Float[Tensor, "*leading grid_height grid_width"]:
    """Smooth each grid with a Gaussian that is cut off at four standard deviations; grids mirror at edges.

    The mirror is at the outer edge of the border cells (d c b a | a b c d | d c b a), so the sum of a grid
    and a constant grid stay as they are.

    Args:
        relevance_grids: grids of any range, on any device; the device is not waited for.
        sigma_cells: standard deviation along both axes, in cells; at 0 the grids are returned as they are.

    Returns:
        Grids in float32, or in float64 if the given ones are. A grid with NaN or infinity spoils no other.

    Source: `scipy.ndimage.gaussian_filter` with its default mode, to which the result is equal but for
        rounding.

    Example:
        >>> peak = torch.zeros(1, 5, 5).index_fill(1, torch.tensor(2), 1.0)
        >>> legrad.smoothed_grids(peak, sigma_cells=1.0)[0, :, 0].tolist()
        [0.06, 0.24, 0.39, 0.24, 0.06]
    """
    if not sigma_cells:
        return relevance_grids
    height, width = relevance_grids.shape[-2:]
    kernels = [_kernel(length, sigma_cells) for length in (height, width)]
    packed = uploaded(torch.from_numpy(np.concatenate(kernels, axis=None)), relevance_grids.device)
    rows, columns = packed[: height**2].view(height, height), packed[height**2 :].view(width, width)
    # in float64, so that a batch's size, which changes the order of sums, does not change the rounded result
    smooth = rows @ relevance_grids.double() @ columns.mT
    return smooth.to(torch.float64 if relevance_grids.dtype == torch.float64 else torch.float32)


@lru_cache(maxsize=64)
def _kernel(length: int, sigma_cells: float) -> Float64[np.ndarray, "length length"]:
    """Return the matrix that smooths a line of cells."""
    # imported here, as it takes long and few jobs smooth
    from scipy import ndimage

    kernel: np.ndarray = ndimage.gaussian_filter1d(np.eye(length), sigma_cells, axis=0)
    return kernel
