"""Thresholds of heat maps: fixed, or computed from the values of each map."""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from legrad.errors import MaskError

OTSU_BINS = 256
# of a map from 0 to 1
BIN_CENTRES = (np.arange(OTSU_BINS) + 0.5) / OTSU_BINS
RULES = ("fixed", "otsu", "quantile", "band")
BAND_CENTERS = ("half", "otsu")

Threshold = TypeVar("Threshold", float, Tensor)


@dataclass(frozen=True)
class MaskRule:
    """Rule that turns a heat map into a mask: foreground is every pixel strictly above a threshold.

    Attributes:
        rule: `fixed`: threshold every map at `value`. `otsu`: use Otsu's threshold of each map. `quantile`:
            choose each map's threshold so that the share `quantile` of its pixels is background. `band`:
            pixels above `high` are foreground, and those between `low` and `high` are neither foreground nor
            background.
        value: threshold of `fixed`, in [0, 1].
        quantile: share of background pixels of `quantile`, in [0, 1].
        low: lower threshold of `band`, in [0, 1].
        high: upper threshold of `band`, in [0, 1], above `low`.
        band_center: scale of `low` and `high`. `half`: they are values of the heat map. `otsu`: 0.5 is
            each map's Otsu threshold; the scale is linear from 0 to it, and from it to 1.

    Raises:
        MaskError: a value is out of range, or the rule is unknown.

    Source: fixed: the usual threshold of class activation maps, as in CAM (arXiv:1512.04150), section 4.1,
        where it is a share of the maximum. otsu: see `otsu_threshold`. band: two thresholds with an ignored
        region between them: SEC (arXiv:1603.06098) trains on confident seeds only; AffinityNet
        (arXiv:1803.10464), section 3.2, and IRNet (arXiv:1904.05044), section 3.4, ignore the region.

    Example:
        >>> rule = legrad.MaskRule("band", low=0.3, high=0.6)
        >>> masks = legrad.grid_to_masks(grids, image.height, image.width, rule)
        >>> len(masks.rles), len(masks.ignores)
        (2, 2)
    """

    rule: str = "fixed"
    value: float = 0.5
    quantile: float = 0.8
    low: float = 0.25
    high: float = 0.75
    band_center: str = "half"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise MaskError(f"mask rule: expected one of {', '.join(RULES)}, received {self.rule!r}")
        if self.band_center not in BAND_CENTERS:
            raise MaskError(f"mask rule: expected band_center half or otsu, received {self.band_center!r}")
        for name in ("value", "quantile", "low", "high"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise MaskError(f"mask rule: expected {name} from 0 to 1, received {share!r}")
        if not self.low < self.high:
            raise MaskError(f"mask rule: expected low below high, received {self.low!r} and {self.high!r}")


def cuts_of(
    heatmap_columns: Float32[np.ndarray, "width height"], rule: MaskRule, *, is_stretched: bool = False
) -> tuple[float, float]:
    """Compute the lower and the upper threshold of a heat map; they differ for rule `band` only.

    Args:
        heatmap_columns: values from 0 to 1, column by column.
        rule: the rule to apply.
        is_stretched: see `otsu_threshold`.
    """
    match rule.rule:
        case "fixed":
            cut = rule.value
        case "otsu":
            cut = _otsu_on_cpu(heatmap_columns.ravel(), is_stretched)
        case "quantile":
            cut = float(quantile_threshold(torch.from_numpy(heatmap_columns).mT, rule.quantile))
        case "band":
            by_otsu = rule.band_center == "otsu"
            center = _otsu_on_cpu(heatmap_columns.ravel(), is_stretched) if by_otsu else 0.5
            return on_scale(rule.low, center), on_scale(rule.high, center)
        case _:
            raise MaskError(f"mask rule: {rule.rule!r} has no threshold")
    return cut, cut


def on_scale(position: float, center: Threshold) -> Threshold:
    """Return a threshold by its position on the scale of a band; see `MaskRule.band_center`."""
    if position <= 0.5:
        return 2 * position * center
    return center + (2 * position - 1) * (1 - center)


def otsu_threshold(
    heatmaps: Float[Tensor, "*leading height width"], *, is_stretched: bool = False
) -> Float[Tensor, "*leading"]:
    """Compute Otsu's threshold of each map.

    Args:
        heatmaps: maps of any finite range.
        is_stretched: promise that each map has minimum 0 and maximum 1, or is all zeros; saves time.

    Returns:
        Centre of the chosen bin, out of 256 between the minimum and maximum of the map; the value itself for
        a constant map.

    Source: Otsu, "A threshold selection method from gray-level histograms" (1979): the threshold with the
        greatest between-class variance.

    Example:
        >>> heatmap = torch.tensor([[0.0, 0.08], [0.9, 1.0]])
        >>> (heatmap > legrad.otsu_threshold(heatmap)).tolist()
        [[False, False], [True, True]]
    """
    leading = heatmaps.shape[:-2]
    if not leading.numel():
        return heatmaps.new_zeros(leading)
    # mT first: maps from upsample_grid are stored column by column, so that flattening copies nothing.
    values = heatmaps.mT.reshape(leading.numel(), -1)
    if values.device.type == "cpu" and values.dtype == torch.float32:
        maps = values.detach().numpy()
        on_cpu = [_otsu_on_cpu(each, is_stretched) for each in maps]
        return torch.tensor(on_cpu, dtype=heatmaps.dtype).reshape(leading)
    if is_stretched:
        cuts = _otsu_of_stretched(values)
    else:
        # Two passes, as torch.aminmax along a dimension is eight times slower.
        lowest = values.amin(dim=1)
        span = values.amax(dim=1) - lowest
        stretched = (values - lowest[:, None]).div_(torch.where(span > 0, span, 1)[:, None])
        cuts = lowest + _otsu_of_stretched(stretched) * span
    return cuts.to(heatmaps.dtype).reshape(leading)


def _otsu_on_cpu(values: Float32[np.ndarray, " pixels"], is_stretched: bool) -> float:
    """Compute the threshold of one map by NumPy, whose calls take a tenth of the time of torch's."""
    lowest, highest = (0.0, 1.0) if is_stretched else (float(values.min()), float(values.max()))
    span = highest - lowest
    if not span > 0:
        return lowest
    stretched = values if is_stretched else (values - lowest) / np.float32(span)
    scaled = stretched * np.float32(OTSU_BINS)
    bins = np.minimum(scaled, OTSU_BINS - 1, out=scaled).astype(np.uint8)
    # torch counts bytes twice as fast as NumPy
    counts = torch.bincount(torch.from_numpy(bins), minlength=OTSU_BINS).numpy()
    if counts[0] == len(values):
        return lowest
    weight, moment = counts.cumsum(), (counts * BIN_CENTRES).cumsum()
    lower, upper = weight[:-1], len(values) - weight[:-1]
    # a bin that is empty beside no other pixels weighs nothing
    mean_gap = moment[:-1] / np.maximum(lower, 1) - (moment[-1] - moment[:-1]) / np.maximum(upper, 1)
    return lowest + span * float(BIN_CENTRES[np.argmax(lower * upper * mean_gap**2)])


def _otsu_of_stretched(unit_values: Float[Tensor, "maps pixels"]) -> Float64[Tensor, " maps"]:
    return otsu_of_counts(_histograms(unit_values))


def otsu_of_counts(counts: Int[Tensor, "maps bins"]) -> Float64[Tensor, " maps"]:
    """Compute Otsu's threshold of each map from its histogram.

    Args:
        counts: pixels in each of 256 equal bins from the minimum of the map to its maximum.

    Returns:
        Centre of the chosen bin, from 0 at the minimum to 1 at the maximum; 0 for a constant map.
    """
    centres = (torch.arange(OTSU_BINS, dtype=torch.float64, device=counts.device) + 0.5) / OTSU_BINS
    best_bin = _between_class_variance(counts.double(), centres).argmax(dim=1)
    is_constant = counts[:, 0] == counts.sum(dim=1)
    return torch.where(is_constant, 0.0, centres[best_bin])


def _histograms(unit_values: Float[Tensor, "maps pixels"]) -> Int[Tensor, "maps bins"]:
    # bincount would make the CPU wait for a GPU; a map that is not finite must not reach beyond its bins
    bins = (unit_values * OTSU_BINS).nan_to_num_(0).clamp_(0, OTSU_BINS - 1).long()
    counts = torch.zeros(len(bins), OTSU_BINS, dtype=torch.int64, device=bins.device)
    return counts.scatter_add_(1, bins, counts.new_ones(1, 1).expand_as(bins))


def _between_class_variance(
    counts: Float[Tensor, "maps bins"], centres: Float[Tensor, " bins"]
) -> Float[Tensor, "maps cuts"]:
    # Threshold k separates bins 0..k from k+1..255; the outer bins are never empty, so no weight is zero.
    weight, moment = counts.cumsum(dim=1), (counts * centres).cumsum(dim=1)
    lower_weight, lower_moment = weight[:, :-1], moment[:, :-1]
    upper_weight, upper_moment = weight[:, -1:] - lower_weight, moment[:, -1:] - lower_moment
    mean_gap = lower_moment / lower_weight - upper_moment / upper_weight
    return torch.nan_to_num(lower_weight * upper_weight * mean_gap**2)


def quantile_threshold(
    heatmaps: Float[Tensor, "*leading height width"], share: float
) -> Float[Tensor, "*leading"]:
    """Compute the threshold of each map below or at which lies at least a share of its pixels.

    Args:
        heatmaps: maps of any range.
        share: from 0 to 1; at most the share 1 - `share` of the pixels lies above the threshold.

    Returns:
        The lowest such value among the map's own.
    """
    values = heatmaps.mT.flatten(-2)
    pixels = values.shape[-1]
    # The small number keeps rounding errors of the product from adding a pixel.
    rank = min(max(math.ceil(share * pixels - 1e-9), 1), pixels)
    return values.kthvalue(rank, dim=-1).values


def foreground_contrast(
    relevance_grids: Float[Tensor, "prompts grid_height grid_width"],
) -> Float[Tensor, " prompts"]:
    """Compute the contrast of each raw grid: mean above its Otsu threshold minus mean below it.

    It is in raw units, like the peak, because min-max normalisation would make the contrast of pure noise as
    high as that of any other map.

    Args:
        relevance_grids: raw relevance.

    Returns:
        At least 0; 0 for a constant grid.

    Source: Otsu (1979): the difference of the two class means in the between-class variance.
    """
    cuts = otsu_threshold(relevance_grids)
    inside = relevance_grids > cuts[:, None, None]
    total, total_inside = relevance_grids.sum((1, 2)), (relevance_grids * inside).sum((1, 2))
    cells_inside = inside.sum((1, 2))
    cells = inside.shape[1] * inside.shape[2]
    gap = total_inside / cells_inside - (total - total_inside) / (cells - cells_inside)
    return torch.where(cells_inside > 0, gap, 0.0)
