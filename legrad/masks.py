"""From relevance grids to masks: upsample, normalise, threshold, encode.

Frames: a *relevance grid* has one cell per image patch; a *heat map* has one value per pixel of the mask
frame (height, width), which need not be the model's input size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from pycocotools import mask as coco
from torch import Tensor

from legrad.errors import LeGradError

OTSU_BINS = 256
Normalisation = Literal["upsampled", "grid"]


class MaskError(LeGradError):
    """Grids, masks or a rule from which no masks can be made."""


class Rle(TypedDict):
    """One mask in COCO's compressed run-length encoding: `size` is [height, width]."""

    size: list[int]
    counts: str


@dataclass(frozen=True)
class MaskRule:
    """How a heat map becomes a mask: the pixels strictly above a threshold.

    Attributes:
        rule: `fixed` cuts every map at `value`; `otsu` finds the cut of each map, and ignores `value`.
        value: the cut in heat-map units, from 0 to 1.
    """

    rule: str = "fixed"
    value: float = 0.5

    def __post_init__(self) -> None:
        if self.rule not in ("fixed", "otsu"):
            raise MaskError(f"mask rule: expected 'fixed' or 'otsu', received {self.rule!r}")
        if not 0 <= self.value <= 1:
            raise MaskError(f"mask threshold: expected a value from 0 to 1, received {self.value!r}")


@dataclass(frozen=True)
class ImageMasks:
    """The masks of one image, one for each prompt, in the prompts' order.

    Attributes:
        rles: the masks; an empty mask is one run of zeros.
        areas: foreground pixels of each mask.
        bboxes_xywh: left, top, width and height in pixels; zeros for an empty mask.
        thresholds: the cut that each heat map was given, from 0 to 1.
    """

    rles: list[Rle]
    areas: Int64[np.ndarray, " prompts"]
    bboxes_xywh: Float32[np.ndarray, "prompts 4"]
    thresholds: Float32[np.ndarray, " prompts"]


def minmax_normalise(maps: Float[Tensor, "*leading height width"]) -> Float[Tensor, "*leading height width"]:
    """Stretch each map to the range from 0 to 1; a constant map becomes zeros.

    Source: LeGrad (arXiv:2404.03214), section 3.3: the merged map is min-max normalised.
    """
    lowest = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - lowest
    return (maps - lowest).div_(torch.where(span > 0, span, 1))


def upsample_grid(
    relevance_grid: Float[Tensor, "*leading grid_height grid_width"], height: int, width: int
) -> Float[Tensor, "*leading height width"]:
    """Interpolate grids to a pixel frame: bilinear, pixel centres aligned as areas, no antialiasing.

    Args:
        relevance_grid: one grid for each leading index, of any range.
        height: rows of the pixel frame.
        width: columns of the pixel frame.

    Returns:
        Maps in the grid's own units, stored column by column (a transposed view), as COCO's RLE reads.

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
    # Interpolating what stands above the minimum keeps a constant map constant to the last bit; otherwise
    # rounding would leave a ripple, which min-max normalisation would blow up to a full-range map.
    lowest = columns_first.amin(dim=(-2, -1), keepdim=True)
    pixels = F.interpolate(columns_first - lowest, size=(width, height), mode="bilinear", align_corners=False)
    return pixels.add_(lowest).reshape(*leading, width, height).mT


def heatmaps_of(
    relevance_grid: Float[Tensor, "*leading grid_height grid_width"],
    height: int,
    width: int,
    normalisation: Normalisation,
) -> Float[Tensor, "*leading height width"]:
    """Bring grids to heat maps from 0 to 1 in a pixel frame; a constant map becomes zeros.

    Args:
        relevance_grid: raw relevance.
        height: rows of the pixel frame.
        width: columns of the pixel frame.
        normalisation: "upsampled": min-max after upsampling; "grid": before. The authors do the one or the
            other by model family.
    """
    if normalisation == "grid":
        return upsample_grid(minmax_normalise(relevance_grid), height, width)
    return minmax_normalise(upsample_grid(relevance_grid, height, width))


def otsu_threshold(heatmaps: Float[Tensor, "*leading height width"]) -> Float[Tensor, "*leading"]:
    """Find the cut that separates each map's values best into two classes.

    Args:
        heatmaps: values from 0 to 1.

    Returns:
        The centre of the chosen bin, of 256 between the map's own extremes; a constant map's own value.

    Source: Otsu, "A threshold selection method from gray-level histograms" (1979): the cut with the
        greatest between-class variance.
    """
    leading = heatmaps.shape[:-2]
    # mT first: maps from upsample_grid are stored column by column, and flattening them so takes no copy.
    values = heatmaps.mT.reshape(leading.numel(), -1)
    # one after the other: torch.aminmax along a dimension is eight times slower
    lowest = values.amin(dim=1, keepdim=True)
    span = values.amax(dim=1, keepdim=True) - lowest
    counts = _histograms((values - lowest).div_(torch.where(span > 0, span, 1)))
    centres = (torch.arange(OTSU_BINS, dtype=torch.float64, device=values.device) + 0.5) / OTSU_BINS
    best_bin = _between_class_variance(counts, centres).argmax(dim=1)
    thresholds = torch.where(span[:, 0] > 0, lowest[:, 0] + centres[best_bin] * span[:, 0], lowest[:, 0])
    return thresholds.to(heatmaps.dtype).reshape(leading)


def _histograms(unit_values: Float[Tensor, "maps pixels"]) -> Float[Tensor, "maps bins"]:
    maps = unit_values.shape[0]
    bins = (unit_values * OTSU_BINS).to(torch.int32).clamp_(max=OTSU_BINS - 1)
    offsets = torch.arange(maps, dtype=torch.int32, device=bins.device)[:, None] * OTSU_BINS
    counts = torch.bincount((bins + offsets).flatten(), minlength=maps * OTSU_BINS)
    return counts.reshape(maps, OTSU_BINS).double()


def _between_class_variance(
    counts: Float[Tensor, "maps bins"], centres: Float[Tensor, " bins"]
) -> Float[Tensor, "maps cuts"]:
    # cut k separates bins 0..k from bins k+1..255; the outer bins are never empty, so no weight is zero
    weight, moment = counts.cumsum(dim=1), (counts * centres).cumsum(dim=1)
    lower_weight, lower_moment = weight[:, :-1], moment[:, :-1]
    upper_weight, upper_moment = weight[:, -1:] - lower_weight, moment[:, -1:] - lower_moment
    mean_gap = lower_moment / lower_weight - upper_moment / upper_weight
    return torch.nan_to_num(lower_weight * upper_weight * mean_gap**2)


def encode_rle(
    masks: Shaped[Tensor, "prompts height width"] | Shaped[np.ndarray, "prompts height width"],
) -> list[Rle]:
    """Encode masks as COCO compressed RLE; fastest on masks stored column by column.

    Args:
        masks: boolean or integer; whatever is not zero is foreground.
    """
    foreground = torch.as_tensor(masks).to(torch.bool)
    # [prompts, width, height] in C order is [height, width, prompts] in Fortran order, as pycocotools wants.
    fortran = foreground.mT.contiguous().view(torch.uint8).cpu().numpy().T
    return [
        {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
        for rle in coco.encode(fortran)
    ]


def decode_rle(rle: Rle) -> Bool[np.ndarray, "height width"]:
    """Decode one mask of COCO compressed RLE.

    Raises:
        MaskError: the runs do not fill the size.
    """
    height, width = rle["size"]
    runs = _run_lengths(rle["counts"])
    if ((runs < 0) | (runs > height * width)).any() or runs.sum() != height * width:
        raise MaskError(f"decode_rle: expected runs that fill {height} x {width} pixels, received others")
    # not coco.decode, which warns under numpy 2 at every call
    columns_first = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return columns_first.reshape(width, height).T


def _run_lengths(counts: str) -> Int64[np.ndarray, " runs"]:
    # Digits of five bits, lowest first; bit 5 says that more follow, bit 4 of the last digit is the sign.
    # From the fourth run on, what stands there is the difference to the run before the previous one.
    digits = np.frombuffer(counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if not len(digits):
        return digits
    is_last = digits & 0x20 == 0
    is_last[-1] = True
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    places = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    runs: np.ndarray = np.add.reduceat((digits & 0x1F) << places, starts)
    runs -= ((digits[ends] & 0x10) != 0).astype(np.int64) << (5 * lengths)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def mask_area(rles: Sequence[Rle]) -> Int64[np.ndarray, " prompts"]:
    """Count the foreground pixels of each mask."""
    return np.asarray(coco.area(list(rles)), dtype=np.int64).reshape(len(rles))


def mask_bbox_xywh(rles: Sequence[Rle]) -> Float32[np.ndarray, "prompts 4"]:
    """Find the smallest box around each mask: left, top, width, height in pixels; zeros for an empty mask."""
    return np.asarray(coco.toBbox(list(rles)), dtype=np.float32).reshape(len(rles), 4)


def grid_to_masks(
    relevance_grids: Float[Tensor, "prompts grid_height grid_width"],
    height: int,
    width: int,
    rule: MaskRule,
    *,
    normalisation: Normalisation = "upsampled",
    max_chunk_pixels: int = 2**20,
) -> ImageMasks:
    """Turn one image's relevance grids into masks: upsample, min-max, cut, encode.

    Args:
        relevance_grids: raw grids, one for each prompt; their device does the work up to the encoding.
        height: rows of the mask frame, usually the original image's.
        width: columns of the mask frame.
        rule: where to cut.
        normalisation: see `heatmaps_of`.
        max_chunk_pixels: how many pixels of heat maps are held at a time, though never fewer than one map.

    Raises:
        MaskError: a grid holds NaN or infinity, or the frame has no pixels.
    """
    _refuse_non_finite(relevance_grids)
    rles: list[Rle] = []
    thresholds: list[Tensor] = [torch.zeros(0)]
    for grids in _chunks(relevance_grids, max(1, max_chunk_pixels // max(1, height * width))):
        heatmaps = heatmaps_of(grids.float(), height, width, normalisation)
        cuts = _thresholds(heatmaps, rule)
        rles += encode_rle(heatmaps > cuts[:, None, None])
        thresholds.append(cuts.cpu())
    return ImageMasks(rles, mask_area(rles), mask_bbox_xywh(rles), torch.cat(thresholds).numpy())


def _chunks(grids: Tensor, prompts_per_chunk: int) -> Iterator[Tensor]:
    for start in range(0, grids.shape[0], prompts_per_chunk):
        yield grids[start : start + prompts_per_chunk]


def _thresholds(heatmaps: Float[Tensor, "prompts height width"], rule: MaskRule) -> Float[Tensor, " prompts"]:
    if rule.rule == "otsu":
        return otsu_threshold(heatmaps)
    return heatmaps.new_full((heatmaps.shape[0],), rule.value)


def _refuse_non_finite(relevance_grids: Float[Tensor, "prompts grid_height grid_width"]) -> None:
    finite = relevance_grids.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        prompts = (~finite).nonzero().flatten().tolist()
        raise MaskError(
            f"grid_to_masks: expected finite relevance, received NaN or infinity at prompts {prompts}"
        )
