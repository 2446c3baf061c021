"""Clean masks: drop small components, then fill small holes.

Source: scipy.ndimage (`label`), in the usual order.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from legrad.errors import MaskError

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


@dataclass(frozen=True)
class Cleaning:
    """Smoothing of relevance grids, and cleaning of the masks that are made from them; none by default.

    Attributes:
        smooth: standard deviation of the Gaussian that smooths relevance grids, in patches, at least 0; see
            `legrad.smoothed_grids`.
        min_component: share of the frame in [0, 1]; connected components of a mask below it are dropped.
        max_hole: share of the frame in [0, 1]; holes in a mask up to it are filled.

    Raises:
        MaskError: a value is out of range.

    Example:
        >>> ring = torch.ones(1, 5, 5)
        >>> ring[0, 2, 2] = 0
        >>> rule, cleaning = legrad.MaskRule("fixed"), legrad.Cleaning(max_hole=0.1)
        >>> legrad.grid_to_masks(ring, 5, 5, rule, cleaning=cleaning).areas.tolist()
        [25]
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
        """Whether masks are changed, not only grids."""
        return self.min_component > 0 or self.max_hole > 0


NO_CLEANING = Cleaning()


def clean_mask(
    mask: Bool[np.ndarray, "height width"], cleaning: Cleaning
) -> Bool[np.ndarray, "height width"]:
    """Drop the small components of a mask, then fill its small holes; a transposed mask gives the same.

    Components are 8-connected, holes 4-connected. Background that touches the border of the frame is not a
    hole.
    """
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
