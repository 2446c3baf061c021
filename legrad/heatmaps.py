"""Convert relevance grids to heat maps: upsample and normalise.

A *relevance grid* has one cell per image patch. A *heat map* has one value per pixel of a frame (height,
width), which need not be the model's input size.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from legrad.errors import MaskError

Normalisation = Literal["upsampled", "grid"]


def minmax_normalise(maps: Float[Tensor, "*leading height width"]) -> Float[Tensor, "*leading height width"]:
    """Scale each map linearly to the range from 0 to 1; a constant map becomes zeros.

    Args:
        maps: grids or heat maps of any range.

    Source: LeGrad (arXiv:2404.03214), section 3.3: the merged map is min-max normalised.
    """
    lowest = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - lowest
    return (maps - lowest).div_(torch.where(span > 0, span, 1))


def first_of_equal_maps(maps: Float[Tensor, "maps height width"]) -> list[int]:
    """Return, for each map, the position of the first map that is bit-for-bit equal, often its own.

    Later steps may round equal maps differently, depending on their position in a batch; comparing here keeps
    the result independent of that.
    """
    first: dict[bytes, int] = {}
    every_map = maps.cpu().contiguous().view(torch.uint8).flatten(1).numpy() if maps.numel() else ()
    return [first.setdefault(map_bytes.tobytes(), position) for position, map_bytes in enumerate(every_map)]


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

    Raises:
        MaskError: the frame has no pixels.
    """
    if height < 1 or width < 1:
        raise MaskError(
            f"upsample_grid: expected a frame of at least 1 x 1 pixels, received {height} x {width}"
        )
    leading = relevance_grid.shape[:-2]
    if not leading.numel():
        return relevance_grid.new_zeros((*leading, width, height)).mT
    columns_first = relevance_grid.mT.reshape(1, -1, *relevance_grid.mT.shape[-2:])
    # Subtracting the minimum first keeps a constant map exactly constant. Otherwise rounding would leave a
    # ripple, which min-max normalisation would stretch to the full range.
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
    """
    if normalisation == "grid":
        return upsample_grid(minmax_normalise(relevance_grid), height, width)
    return minmax_normalise(upsample_grid(relevance_grid, height, width))
