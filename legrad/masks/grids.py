"""Convert relevance grids to masks, each prompt on its own: upsample, threshold, clean, encode."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from legrad.errors import MaskError
from legrad.heatmaps import Normalisation, heatmap_columns
from legrad.masks.cleaning import NO_CLEANING, Cleaning, clean_mask
from legrad.masks.rle import Rle, encode_changes, encode_columns, measure_encoded
from legrad.masks.runs import MAX_CHUNK_PIXELS, MapRuns, cut_maps, cuts_on_device
from legrad.masks.smoothing import smoothed_grids
from legrad.masks.thresholds import MaskRule, cuts_of


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

    Example:
        >>> masks = legrad.grid_to_masks(grids, image.height, image.width, legrad.MaskRule("otsu"))
        >>> masks.bboxes_xywh.shape
        (2, 4)
        >>> bool(legrad.decode_rle(masks.rles[0]).sum() == masks.areas[0])
        True
    """

    rles: list[Rle]
    areas: Int64[np.ndarray, " prompts"]
    bboxes_xywh: Float32[np.ndarray, "prompts 4"]
    thresholds: Float32[np.ndarray, " prompts"] | None = None
    thresholds_low: Float32[np.ndarray, " prompts"] | None = None
    ignores: Sequence[Rle] = ()

    def __repr__(self) -> str:
        """Return the number of masks and their sizes in a line."""
        if not self.rles:
            return "ImageMasks(0 masks)"
        height, width = self.rles[0]["size"]
        areas = ", ".join([*map(str, self.areas[:6].tolist()), "..."][: len(self.areas)])
        plural = "mask" if len(self.rles) == 1 else "masks"
        return f"ImageMasks({len(self.rles)} {plural} of {width} x {height} pixels, areas {areas})"


@dataclass(frozen=True)
class HeatmapStack:
    """Heat maps of one image on the CPU, computed one at a time to bound memory.

    Attributes:
        maps: raw relevance grids, or heat maps of any size if `normalisation` is None.
        height: rows of the mask frame, usually the original image's.
        width: columns of the mask frame.
        normalisation: see `heatmaps_of`; None: the maps are in [0, 1] already, and only resized.

    Raises:
        MaskError: a map holds NaN or infinity.
    """

    maps: Float32[np.ndarray, "prompts rows columns"]
    height: int
    width: int
    normalisation: Normalisation | None = "upsampled"

    def __post_init__(self) -> None:
        is_finite = np.isfinite(self.maps)
        if not is_finite.all():
            _require_finite(is_finite.all(axis=(1, 2)))

    def __len__(self) -> int:
        return len(self.maps)

    def columns(self) -> Iterator[Float32[np.ndarray, "width height"]]:
        """Yield the heat maps in order, each one column by column."""
        for each in self.maps:
            yield heatmap_columns(each, self.height, self.width, self.normalisation)


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
            On a GPU they are cut there, unless the rule is `quantile`, masks are cleaned, or a mask has more
            than 2**24 pixels.
        height: rows of the mask frame, usually the original image's.
        width: columns of the mask frame.
        rule: rule for the threshold.
        normalisation: when maps are normalised; see `heatmaps_of`.
        cleaning: smoothing of the grids and cleaning of the masks.
        max_chunk_pixels: bound on the pixels of heat maps held at a time on a GPU, but always at least one
            map. On the CPU it is one map.

    Returns:
        One mask for each prompt, with areas, boxes and thresholds.

    Raises:
        MaskError: a grid holds NaN or infinity, or the frame has no pixels.

    Source: thresholded heat maps as pseudo-masks: CAM (arXiv:1512.04150), section 4.1; see also `MaskRule`.

    Example:
        >>> masks = legrad.grid_to_masks(torch.eye(2)[None], 4, 4, legrad.MaskRule("fixed", value=0.6))
        >>> legrad.decode_rle(masks.rles[0]).astype(int).tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """
    relevance_grids = smoothed_grids(relevance_grids, cleaning.smooth)
    has_room = min(height, width) > 0 and height * width <= MAX_CHUNK_PIXELS
    if relevance_grids.is_cuda and has_room and cuts_on_device(rule, cleaning):
        frames = [(height, width)] * len(relevance_grids)
        cut = cut_maps(relevance_grids, frames, rule, normalisation, max_chunk_pixels=max_chunk_pixels)
        return masks_of_runs(cut.runs(), height, width)
    grids = relevance_grids.detach().float().cpu().numpy()
    stack = HeatmapStack(grids, height, width, normalisation)
    return independent_masks(stack, rule, cleaning)


def independent_masks(stack: HeatmapStack, rule: MaskRule, cleaning: Cleaning = NO_CLEANING) -> ImageMasks:
    """Threshold each heat map on its own.

    Args:
        stack: the heat maps.
        rule: rule for the threshold.
        cleaning: cleaning of the masks; `smooth` is ignored, as it is meant for grids.
    """
    rles: list[Rle] = []
    ignores: list[Rle] = []
    cuts: list[tuple[float, float]] = []
    for heat in stack.columns():
        low, high = cuts_of(heat, rule, is_stretched=stack.normalisation == "upsampled")
        mask = clean_mask(heat > np.float32(high), cleaning)
        rles.append(encode_columns(mask))
        if rule.rule == "band":
            ignores.append(encode_columns((heat > np.float32(low)) & ~mask))
        cuts.append((low, high))
    lows, highs = np.array(cuts, np.float32).reshape(-1, 2).T
    return image_masks(
        rles, thresholds=highs, thresholds_low=lows if rule.rule == "band" else None, ignores=ignores
    )


def masks_of_runs(runs: Sequence[MapRuns], height: int, width: int) -> ImageMasks:
    """Encode masks of one image that were cut on a device.

    Args:
        runs: of each prompt.
        height: rows of the mask frame.
        width: columns of the mask frame.

    Raises:
        MaskError: a map holds NaN or infinity.
    """
    _require_finite(np.array([not math.isnan(each.threshold) for each in runs], bool))
    lows = np.array([each.threshold_low for each in runs], np.float32)
    return image_masks(
        [encode_changes(each.mask, height, width) for each in runs],
        thresholds=np.array([each.threshold for each in runs], np.float32),
        thresholds_low=lows if any(each.ignore is not None for each in runs) else None,
        ignores=[encode_changes(each.ignore, height, width) for each in runs if each.ignore is not None],
    )


def _require_finite(is_finite: Bool[np.ndarray, " prompts"]) -> None:
    if not is_finite.all():
        prompts = np.flatnonzero(~is_finite).tolist()
        raise MaskError(
            f"heat maps: expected finite relevance, received NaN or infinity at prompts {prompts}"
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
