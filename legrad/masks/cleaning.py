"""Clean heat maps and masks: smooth maps, drop small components, fill small holes.

Source: scipy.ndimage (`gaussian_filter`, `label`), in the usual order: smooth, threshold, drop components,
fill holes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from legrad.errors import MaskError

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


@dataclass(frozen=True)
class Cleaning:
    """Cleaning of heat maps before they are thresholded and of masks afterwards; none by default.

    Attributes:
        smooth: standard deviation of the Gaussian that smooths relevance grids, in patches; at least 0.
        min_component: share of the frame in [0, 1]; connected components of a mask below it are dropped.
        max_hole: share of the frame in [0, 1]; holes in a mask up to it are filled.

    Raises:
        MaskError: a value is out of range.
    """

    smooth: float = 0.0
    min_component: float = 0.0
    max_hole: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smooth < float("inf"):
            raise MaskError(f"cleaning: expected smooth of at least 0 patches, received {self.smooth!r}")
        for name in ("min_component", "max_hole"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise MaskError(f"cleaning: expected {name} from 0 to 1, received {share!r}")

    @property
    def changes_masks(self) -> bool:
        """Whether masks are changed, not only heat maps."""
        return self.min_component > 0 or self.max_hole > 0


NO_CLEANING = Cleaning()


def smooth_maps(
    maps: Float[Tensor, "*leading height width"], sigma_height: float, sigma_width: float
) -> Float[Tensor, "*leading height width"]:
    """Smooth each map with a Gaussian; maps are mirrored at their edges.

    Args:
        maps: maps of any range.
        sigma_height: standard deviation along the height, in cells of the maps.
        sigma_width: standard deviation along the width, in cells of the maps.
    """
    if not maps.numel() or not (sigma_height or sigma_width):
        return maps
    from scipy import ndimage

    sigmas = (0.0,) * (maps.ndim - 2) + (sigma_height, sigma_width)
    return torch.from_numpy(ndimage.gaussian_filter(maps.cpu().numpy(), sigmas)).to(maps.device)


def clean_masks(
    masks: Bool[Tensor, "prompts height width"], cleaning: Cleaning
) -> Bool[Tensor, "prompts height width"]:
    """Drop the small components of each mask, then fill its small holes.

    Components are 8-connected, holes 4-connected. Background that touches the border of the frame is not a
    hole.
    """
    if not cleaning.changes_masks or not masks.numel():
        return masks
    # Transposed, because masks are stored column by column and should stay so; the result is the same.
    tidy = [_clean(mask, cleaning) for mask in masks.mT.cpu().numpy()]
    return torch.from_numpy(np.stack(tidy)).to(masks.device).mT


def _clean(mask: Bool[np.ndarray, "height width"], cleaning: Cleaning) -> Bool[np.ndarray, "height width"]:
    if cleaning.min_component > 0:
        mask = _without_small_components(mask, cleaning.min_component * mask.size)
    if cleaning.max_hole > 0:
        mask = mask | _small_holes(mask, cleaning.max_hole * mask.size)
    return mask


def _without_small_components(
    mask: Bool[np.ndarray, "height width"], min_pixels: float
) -> Bool[np.ndarray, "height width"]:
    from scipy import ndimage

    labels, _ = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
    is_kept = np.bincount(labels.ravel()) >= min_pixels
    is_kept[0] = False
    kept: np.ndarray = is_kept[labels]
    return kept


def _small_holes(
    mask: Bool[np.ndarray, "height width"], max_pixels: float
) -> Bool[np.ndarray, "height width"]:
    from scipy import ndimage

    labels, _ = ndimage.label(~mask)
    is_hole = np.bincount(labels.ravel()) <= max_pixels
    is_hole[0] = False
    for border in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        is_hole[border] = False
    holes: np.ndarray = is_hole[labels]
    return holes
