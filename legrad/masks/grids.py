"""From relevance grids to masks: heat maps, cuts, cleaning, encoding; each prompt by itself."""

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

# more would not fit into a core's cache
MAX_CHUNK_PIXELS = 2**19


@dataclass(frozen=True)
class ImageMasks:
    """The masks of one image, one for each prompt, in the prompts' order.

    Attributes:
        rles: the masks; an empty mask is one run of zeros.
        areas: foreground pixels of each mask.
        bboxes_xywh: left, top, width and height in pixels; zeros for an empty mask.
        thresholds: the cut that each heat map was given, from 0 to 1; None where prompts compete.
        thresholds_low: of rule `band`: the cut below which a pixel is background; None otherwise.
        ignores: of rule `band`: what is neither foreground nor background, a mask for each prompt; where
            prompts compete: a single one for the image. No masks with other rules.
    """

    rles: list[Rle]
    areas: Int64[np.ndarray, " prompts"]
    bboxes_xywh: Float32[np.ndarray, "prompts 4"]
    thresholds: Float32[np.ndarray, " prompts"] | None = None
    thresholds_low: Float32[np.ndarray, " prompts"] | None = None
    ignores: Sequence[Rle] = ()


@dataclass(frozen=True)
class HeatmapStack:
    """Heat maps of one image that are made a few at a time, for memory's sake.

    Attributes:
        maps: raw relevance grids, or heat maps of any size where `normalisation` is None.
        height: rows of the mask frame, usually the original image's.
        width: columns of the mask frame.
        normalisation: see `heatmaps_of`; None: the maps are in [0, 1] already, and only resized.
        smooth: standard deviations of a Gaussian along height and width, in cells of `maps`; it acts before
            maps are resized, which costs less and is the same to the eye.
        max_chunk_pixels: how many pixels of heat maps are held at a time, though never fewer than one map.

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
        """The heat maps in order, several at a time."""
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
    """Turn one image's relevance grids into masks: smooth, upsample, min-max, cut, clean, encode.

    Args:
        relevance_grids: raw grids, one for each prompt; their device does the work up to the encoding.
        height: rows of the mask frame, usually the original image's.
        width: columns of the mask frame.
        rule: where to cut.
        normalisation: see `heatmaps_of`.
        cleaning: what is done to maps and masks besides.
        max_chunk_pixels: see `HeatmapStack`.

    Raises:
        MaskError: a grid holds NaN or infinity, or the frame has no pixels.
    """
    smooth = (cleaning.smooth, cleaning.smooth)
    stack = HeatmapStack(relevance_grids, height, width, normalisation, smooth, max_chunk_pixels)
    return independent_masks(stack, rule, cleaning)


def independent_masks(stack: HeatmapStack, rule: MaskRule, cleaning: Cleaning = NO_CLEANING) -> ImageMasks:
    """Cut each heat map by itself.

    Args:
        stack: the heat maps.
        rule: where to cut.
        cleaning: what is done to the masks; smoothing is the stack's own.
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
    """Masks fresh from `encode_rle`, with their areas and boxes; see `ImageMasks`."""
    areas, bboxes_xywh = measure_encoded(rles)
    return ImageMasks(rles, areas, bboxes_xywh, thresholds, thresholds_low, ignores)
