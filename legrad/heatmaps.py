"""Convert relevance grids to heat maps: upsample and normalise.

A *relevance grid* has one cell per image patch. A *heat map* has one value per pixel of a frame (height,
width), which need not be the model's input size.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from legrad.errors import MaskError

Normalisation = Literal["upsampled", "grid"]


def minmax_normalise(maps: Float[Tensor, "*leading height width"]) -> Float[Tensor, "*leading height width"]:
    """Scale each map linearly to the range from 0 to 1; a constant map becomes zeros.

    Args:
        maps: grids or heat maps of any range.

    Source: LeGrad (arXiv:2404.03214), section 3.3: the merged map is min-max normalised.

    Example:
        >>> legrad.minmax_normalise(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).tolist()
        [[0.0, 0.25], [0.5, 1.0]]
    """
    lowest = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - lowest
    return (maps - lowest).div_(torch.where(span > 0, span, 1))


def upsample_grid(
    relevance_grid: Float[Tensor, "*leading grid_height grid_width"], height: int, width: int
) -> Float[Tensor, "*leading height width"]:
    """Interpolate grids bilinearly to a pixel frame (`align_corners=False`, no antialiasing).

    Args:
        relevance_grid: one grid for each leading index, of any range.
        height: rows of the pixel frame.
        width: columns of the pixel frame.

    Returns:
        Maps in the grid's own units, stored column by column (a transposed view), the order of COCO's RLE.
        float32 maps on the CPU are interpolated by OpenCV, others by torch; they differ by rounding errors.

    Raises:
        MaskError: the frame has no pixels.

    Example:
        >>> legrad.upsample_grid(torch.tensor([[0.0, 1.0]]), height=1, width=4).tolist()
        [[0.0, 0.25, 0.75, 1.0]]
    """
    _require_pixels(height, width)
    leading = relevance_grid.shape[:-2]
    if not leading.numel():
        return relevance_grid.new_zeros((*leading, width, height)).mT
    is_on_cpu = relevance_grid.device.type == "cpu" and relevance_grid.dtype == torch.float32
    if is_on_cpu and not relevance_grid.requires_grad:
        grids = relevance_grid.reshape(-1, *relevance_grid.shape[-2:]).numpy()
        columns = np.stack([upsample_columns(grid, height, width) for grid in grids])
        return torch.from_numpy(columns).reshape(*leading, width, height).mT
    columns_first = relevance_grid.mT.reshape(1, -1, *relevance_grid.mT.shape[-2:])
    # see upsample_columns
    lowest = columns_first.amin(dim=(-2, -1), keepdim=True)
    pixels = F.interpolate(columns_first - lowest, size=(width, height), mode="bilinear", align_corners=False)
    return pixels.add_(lowest).reshape(*leading, width, height).mT


def heatmaps_of(
    relevance_grid: Float[Tensor, "*leading grid_height grid_width"],
    height: int,
    width: int,
    normalisation: Normalisation,
) -> Float[Tensor, "*leading height width"]:
    """Convert grids to heat maps from 0 to 1 in a pixel frame; a constant map becomes zeros.

    Args:
        relevance_grid: raw relevance, one grid for each leading index.
        height: rows of the pixel frame.
        width: columns of the pixel frame.
        normalisation: "upsampled": min-max normalise after upsampling; "grid": before. The authors choose by
            model family; `explainer.tower.normalisation` is their choice for a model.

    Returns:
        Heat maps, stored column by column.

    Raises:
        MaskError: the frame has no pixels.

    Source: `legrad_torch` 1.1, `LeWrapper.compute_legrad`.

    Example:
        >>> heatmaps = legrad.heatmaps_of(grids, image.height, image.width, explainer.tower.normalisation)
        >>> heatmaps.amin(dim=(-2, -1)), heatmaps.amax(dim=(-2, -1))
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    if normalisation == "grid":
        return upsample_grid(minmax_normalise(relevance_grid), height, width)
    return minmax_normalise(upsample_grid(relevance_grid, height, width))


def upsample_columns(
    relevance_grid: Float32[np.ndarray, "grid_height grid_width"], height: int, width: int
) -> Float32[np.ndarray, "width height"]:
    """Interpolate one grid as `upsample_grid` does; the result is transposed, column by column.

    Args:
        relevance_grid: of any range.
        height: rows of the pixel frame.
        width: columns of the pixel frame.

    Raises:
        MaskError: the frame has no pixels.
    """
    # Imported here, as it takes long and most programs need no masks.
    import cv2

    _require_pixels(height, width)
    # Subtracting the minimum first keeps a constant map exactly constant. Otherwise rounding would leave a
    # ripple, which min-max normalisation would stretch to the full range.
    lowest = relevance_grid.min()
    above = relevance_grid if lowest == 0 else relevance_grid - lowest
    columns: np.ndarray = cv2.resize(cv2.transpose(above), (height, width), interpolation=cv2.INTER_LINEAR)
    if lowest != 0:
        columns += lowest
    return columns


def heatmap_columns(
    relevance_grid: Float32[np.ndarray, "grid_height grid_width"],
    height: int,
    width: int,
    normalisation: Normalisation | None,
) -> Float32[np.ndarray, "width height"]:
    """Convert one grid to a heat map as `heatmaps_of` does; the result is transposed, column by column.

    Args:
        relevance_grid: raw relevance, or values from 0 to 1 if `normalisation` is None.
        height: rows of the pixel frame.
        width: columns of the pixel frame.
        normalisation: see `heatmaps_of`; None: the grid is only resized.

    Raises:
        MaskError: the frame has no pixels.
    """
    if normalisation == "grid":
        return upsample_columns(_stretched(relevance_grid), height, width)
    columns = upsample_columns(relevance_grid, height, width)
    return columns if normalisation is None else _stretched(columns)


def _stretched(values: Float32[np.ndarray, "rows columns"]) -> Float32[np.ndarray, "rows columns"]:
    """Return the values as `minmax_normalise` scales them."""
    lowest, highest = values.min(), values.max()
    stretched: np.ndarray = values - lowest
    if highest > lowest:
        stretched /= highest - lowest
    return stretched


def _require_pixels(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise MaskError(
            f"upsample_grid: expected a frame of at least 1 x 1 pixels, received {height} x {width}"
        )
