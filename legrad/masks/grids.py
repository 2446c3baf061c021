"""Convert relevance grids to masks, each prompt on its own: upsample, threshold, clean, encode."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from legrad.errors import MaskError
from legrad.heatmaps import Normalisation, heatmaps_of, upsample_grid
from legrad.masks.cleaning import NO_CLEANING, Cleaning, clean_masks, smooth_maps
from legrad.masks.rle import Rle, encode_rle, measure_encoded
from legrad.masks.thresholds import MaskRule, cuts_of

# Larger chunks would not fit into the cache of a core.
MAX_CHUNK_PIXELS = 2**19


@dataclass(frozen=True)
class ImageMasks:
    """Masks of one image, one for each prompt, in the prompts' order.

    Attributes:
        rles: the masks in COCO's run-length encoding; see `decode_rle`.
        areas: number of foreground pixels of each mask.
        bboxes_xywh: left, top, width and height in pixels; zeros for an empty mask.
        thresholds: threshold applied to each heat map, from 0 to 1; None if prompts compete.
        thresholds_low: with rule `band`, the threshold below which a pixel is background; None otherwise.
        ignores: with rule `band`, masks of the pixels that are neither foreground nor background: one for
            each prompt, or a single one for the image if prompts compete. Empty with other rules.
    """

    rles: list[Rle]
    areas: Int64[np.ndarray, " prompts"]
    bboxes_xywh: Float32[np.ndarray, "prompts 4"]
    thresholds: Float32[np.ndarray, " prompts"] | None = None
    thresholds_low: Float32[np.ndarray, " prompts"] | None = None
    ignores: Sequence[Rle] = ()


@dataclass(frozen=True)
class HeatmapStack:
    """Heat maps of one image, computed a few at a time to bound memory.

    Attributes:
        maps: raw relevance grids, or heat maps of any size if `normalisation` is None.
        height: rows of the mask frame, usually the original image's.
        width: columns of the mask frame.
        normalisation: see `heatmaps_of`; None: the maps are in [0, 1] already, and only resized.
        smooth: standard deviations of a Gaussian along height and width, in cells of `maps`. It is applied
            before maps are resized, which is cheaper and looks the same.
        max_chunk_pixels: bound on the pixels of heat maps held at a time, but always at least one map.

    Raises:
        MaskError: a map holds NaN or infinity.
    """

    maps: Float[Tensor, "prompts rows columns"]
    height: int
    width: int
    normalisation: Normalisation | None = "upsampled"
    smooth: tuple[float, float] = (0.0, 0.0)
    max_chunk_pixels: int = MAX_CHUNK_PIXELS

    def __post_init__(self) -> None:
        finite = self.maps.isfinite().flatten(1).all(dim=1)
        if not bool(finite.all()):
            prompts = (~finite).nonzero().flatten().tolist()
            raise MaskError(
                f"heat maps: expected finite relevance, received NaN or infinity at prompts {prompts}"
            )

    def __len__(self) -> int:
        return self.maps.shape[0]

    def chunks(self) -> Iterator[Float[Tensor, "chunk height width"]]:
        """Yield the heat maps in order, several at a time."""
        maps_per_chunk = max(1, self.max_chunk_pixels // max(1, self.height * self.width))
        for start in range(0, len(self), maps_per_chunk):
            maps = smooth_maps(self.maps[start : start + maps_per_chunk].float(), *self.smooth)
            if self.normalisation is None:
                yield upsample_grid(maps, self.height, self.width)
            else:
                yield heatmaps_of(maps, self.height, self.width, self.normalisation)


def grid_to_masks(
    relevance_grids: Float[Tensor, "prompts grid_height grid_width"],
    height: int,
    width: int,
    rule: MaskRule,
    *,
    normalisation: Normalisation = "upsampled",
    cleaning: Cleaning = NO_CLEANING,
    max_chunk_pixels: int = MAX_CHUNK_PIXELS,
) -> ImageMasks:
    """Convert relevance grids of one image to masks: smooth, upsample, normalise, threshold, clean, encode.

    Args:
        relevance_grids: raw grids, one for each prompt, as `LeGrad.relevance` returns them for one image.
            Everything before the encoding runs on their device.
        height: rows of the mask frame, usually the original image's.
        width: columns of the mask frame.
        rule: rule for the threshold.
        normalisation: when maps are normalised; see `heatmaps_of`.
        cleaning: smoothing of the grids and cleaning of the masks.
        max_chunk_pixels: bound on the pixels of heat maps held at a time, but always at least one map.

    Returns:
        One mask for each prompt, with areas, boxes and thresholds.

    Raises:
        MaskError: a grid holds NaN or infinity, or the frame has no pixels.

    Source: thresholded heat maps as pseudo-masks: CAM (arXiv:1512.04150), section 4.1; see also `MaskRule`.
    """
    smooth = (cleaning.smooth, cleaning.smooth)
    stack = HeatmapStack(relevance_grids, height, width, normalisation, smooth, max_chunk_pixels)
    return independent_masks(stack, rule, cleaning)


def independent_masks(stack: HeatmapStack, rule: MaskRule, cleaning: Cleaning = NO_CLEANING) -> ImageMasks:
    """Threshold each heat map on its own.

    Args:
        stack: the heat maps.
        rule: rule for the threshold.
        cleaning: cleaning of the masks; `smooth` is ignored, as the stack smooths.
    """
    rles: list[Rle] = []
    ignores: list[Rle] = []
    lows, highs = [torch.zeros(0)], [torch.zeros(0)]
    for heatmaps in stack.chunks():
        low, high = cuts_of(heatmaps, rule, is_stretched=stack.normalisation == "upsampled")
        masks = clean_masks(heatmaps > high[:, None, None], cleaning)
        rles += encode_rle(masks)
        if rule.rule == "band":
            ignores += encode_rle((heatmaps > low[:, None, None]) & ~masks)
        lows.append(low.cpu())
        highs.append(high.cpu())
    return image_masks(
        rles,
        thresholds=torch.cat(highs).numpy(),
        thresholds_low=torch.cat(lows).numpy() if rule.rule == "band" else None,
        ignores=ignores,
    )


def image_masks(
    rles: list[Rle],
    *,
    thresholds: Float32[np.ndarray, " prompts"] | None = None,
    thresholds_low: Float32[np.ndarray, " prompts"] | None = None,
    ignores: Sequence[Rle] = (),
) -> ImageMasks:
    """Return masks just made by `encode_rle` with their areas and boxes; see `ImageMasks`."""
    areas, bboxes_xywh = measure_encoded(rles)
    return ImageMasks(rles, areas, bboxes_xywh, thresholds, thresholds_low, ignores)
