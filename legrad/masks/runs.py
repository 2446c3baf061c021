"""Cut the maps of a whole batch on their device, whatever the sizes of their frames, and find the runs.

The pixels of all maps are in one flat array; see `legrad.masks.flat`. So a fixed number of operations serves
any number of maps, and only the positions where masks change leave the device.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int32
from torch import Tensor

from legrad.heatmaps import Normalisation, minmax_normalise
from legrad.masks.cleaning import Cleaning
from legrad.masks.flat import FlatLayout, HeightWidth, interpolated
from legrad.masks.thresholds import OTSU_BINS, MaskRule, on_scale, otsu_of_counts

# About 50 bytes a pixel are held at a time.
MAX_CHUNK_PIXELS = 2**24
RULES_ON_DEVICE = ("fixed", "otsu", "band")


@dataclass(frozen=True)
class CutMaps:
    """Masks of maps as the positions where they change, on the device of the maps.

    Attributes:
        changes: positions in the column-major frame of a mask whose value differs from that of the pixel
            before; the pixel before the first one counts as background. Chunk after chunk of maps; within a
            chunk first the masks, then, with rule `band`, the ignore masks.
        counts: number of changes of each mask, in the order of `changes`.
        thresholds: lower and upper threshold of each map, in units of heat maps; NaN for a map that is not
            finite.
        chunks: number of maps in each chunk.
        has_ignores: whether there are ignore masks.
    """

    changes: Int32[Tensor, " changes"]
    counts: Int32[Tensor, " masks"]
    thresholds: Float32[Tensor, "maps 2"]
    chunks: tuple[int, ...]
    has_ignores: bool

    @property
    def tensors(self) -> list[Tensor]:
        """What has to be brought to the CPU for `runs_of`."""
        return [self.changes, self.counts, self.thresholds]

    def runs(self) -> list["MapRuns"]:
        """Return the masks of each map on the CPU."""
        return self.runs_of(*(tensor.cpu().numpy() for tensor in self.tensors))

    def runs_of(self, changes: np.ndarray, counts: np.ndarray, thresholds: np.ndarray) -> list["MapRuns"]:
        """Return the masks of each map as slices of `tensors`, which were brought to the CPU."""
        ends = counts.cumsum(dtype=np.int64).tolist()
        pieces = [changes[start:end] for start, end in itertools.pairwise([0, *ends])]
        masks: list[np.ndarray] = []
        ignores: list[np.ndarray | None] = []
        for maps in self.chunks:
            masks += pieces[:maps]
            ignores += pieces[maps : 2 * maps] if self.has_ignores else [None] * maps
            pieces = pieces[maps * (1 + self.has_ignores) :]
        columns = zip(masks, ignores, thresholds[:, 1].tolist(), thresholds[:, 0].tolist(), strict=True)
        return list(itertools.starmap(MapRuns, columns))


@dataclass(frozen=True)
class MapRuns:
    """Masks of one map on the CPU, as the positions where they change; see `CutMaps`.

    Attributes:
        mask: of the foreground.
        ignore: with rule `band`, of the pixels that are neither foreground nor background.
        threshold: threshold of the foreground, in units of heat maps; NaN for a map that is not finite.
        threshold_low: threshold of the background.
    """

    mask: Int32[np.ndarray, " mask_changes"]
    ignore: Int32[np.ndarray, " ignore_changes"] | None
    threshold: float
    threshold_low: float


def cuts_on_device(rule: MaskRule, cleaning: Cleaning) -> bool:
    """Return whether `cut_maps` makes the masks that a rule and a cleaning ask for."""
    return rule.rule in RULES_ON_DEVICE and not cleaning.changes_masks


def cost_pixels(frame: HeightWidth, map_rows: int) -> int:
    """Return how much of a chunk a map takes: its pixels, or its columns before their rows are interpolated.

    Args:
        frame: height and width of the mask.
        map_rows: rows of the map.
    """
    height, width = frame
    return width * max(height, map_rows + 1)


def cut_maps(
    maps: Float[Tensor, "maps rows columns"],
    frames: Sequence[HeightWidth],
    rule: MaskRule,
    normalisation: Normalisation | None,
    *,
    max_chunk_pixels: int = MAX_CHUNK_PIXELS,
) -> CutMaps:
    """Upsample and threshold maps on their device; the host waits once for each chunk of maps.

    Args:
        maps: relevance grids, or heat maps in [0, 1] if `normalisation` is None.
        frames: height and width of each map's mask, fewer than 2**31 pixels each.
        rule: one of `RULES_ON_DEVICE`.
        normalisation: see `heatmaps_of`.
        max_chunk_pixels: bound on the pixels of heat maps held at a time, but always at least one map.

    Returns:
        The same masks as `independent_masks`, but for pixels within a rounding error of a threshold.
    """
    kinds = 2 if rule.rule == "band" else 1
    nothing = torch.zeros(0, dtype=torch.int32, device=maps.device)
    changes, counts, thresholds = [nothing], [nothing], [torch.zeros(0, 2, device=maps.device)]
    chunks: list[int] = []
    for part in _chunks([cost_pixels(frame, maps.shape[1]) for frame in frames], max_chunk_pixels):
        heat = maps[part].float()
        layout = FlatLayout.of(frames[part], (maps.shape[1], maps.shape[2]), maps.device)
        cuts, masks = _masks(heat, layout, rule, normalisation)
        for found, every in zip(_changes(masks, layout), (changes, counts), strict=True):
            every.append(found)
        zeros_or_nan = (heat - heat).sum((1, 2))
        thresholds.append(cuts + zeros_or_nan[:, None])
        chunks.append(len(heat))
    return CutMaps(torch.cat(changes), torch.cat(counts), torch.cat(thresholds), tuple(chunks), kinds == 2)


def _masks(
    maps: Float32[Tensor, "maps rows columns"],
    layout: FlatLayout,
    rule: MaskRule,
    normalisation: Normalisation | None,
) -> tuple[Float32[Tensor, "maps 2"], Bool[Tensor, "kinds pixels"]]:
    """Return the thresholds of each map; whether pixels are foreground and, with rule `band`, ignored."""
    values = interpolated(minmax_normalise(maps) if normalisation == "grid" else maps, layout)
    cuts, levels = _cuts(values, layout, rule, is_stretched=normalisation == "upsampled")
    low, high = levels.index_select(0, layout.map_of_column).T
    masks = values > high.index_select(0, layout.column)
    if rule.rule != "band":
        return cuts, masks[None]
    return cuts, torch.stack([masks, (values > low.index_select(0, layout.column)) & ~masks])


def _chunks(costs: Sequence[int], most: int) -> Iterator[slice]:
    """Divide maps into consecutive parts whose costs sum to `most` or less, but at least one map each."""
    start, total = 0, 0
    for position, cost in enumerate(costs):
        if position > start and total + cost > most:
            yield slice(start, position)
            start, total = position, 0
        total += cost
    if start < len(costs):
        yield slice(start, len(costs))


def _cuts(
    values: Float32[Tensor, " pixels"], layout: FlatLayout, rule: MaskRule, *, is_stretched: bool
) -> tuple[Float32[Tensor, "maps 2"], Float32[Tensor, "maps 2"]]:
    """Return the lower and the upper threshold of each map: as values of its heat map, and of `values`."""
    by_otsu = rule.rule == "otsu" or (rule.rule == "band" and rule.band_center == "otsu")
    lowest = span = values.new_ones(len(layout.widths), dtype=torch.float64)
    if is_stretched or by_otsu:
        lowest, span = _ranges(values, layout)
    cuts = lowest.new_full((len(lowest), 2), rule.value)
    if rule.rule != "fixed":
        center: Tensor = lowest.new_full((len(lowest),), 0.5)
        if by_otsu:
            center = _otsu(values, layout, lowest, span)
            center = center if is_stretched else lowest + center * span
        low, high = (rule.low, rule.high) if rule.rule == "band" else (0.5, 0.5)
        cuts = torch.stack([on_scale(low, center), on_scale(high, center)], dim=1)
    cuts = cuts.float()  # as on the CPU
    return cuts, (lowest[:, None] + cuts * span[:, None]).float() if is_stretched else cuts


def _ranges(
    values: Float32[Tensor, " pixels"], layout: FlatLayout
) -> tuple[Float64[Tensor, " maps"], Float64[Tensor, " maps"]]:
    """Return the minimum of each map, and the difference of the maximum to it."""
    extremes = []
    for reduce in ("min", "max"):
        # first each column, as one map at a time would leave most of a device idle
        of_columns = torch.segment_reduce(values, reduce, lengths=layout.heights, unsafe=True)
        extremes.append(torch.segment_reduce(of_columns, reduce, lengths=layout.widths, unsafe=True).double())
    return extremes[0], extremes[1] - extremes[0]


def _otsu(
    values: Float32[Tensor, " pixels"],
    layout: FlatLayout,
    lowest: Float64[Tensor, " maps"],
    span: Float64[Tensor, " maps"],
) -> Float64[Tensor, " maps"]:
    """Return Otsu's threshold of each map, from 0 at its minimum to 1 at its maximum."""
    maps = len(lowest)
    map_of_pixel = layout.map_of_column.index_select(0, layout.column)
    stretched = values - lowest.float().index_select(0, map_of_pixel)
    stretched /= torch.where(span > 0, span, 1).float().index_select(0, map_of_pixel)
    # a map that is not finite must not reach beyond its bins
    bins = stretched.mul_(OTSU_BINS).nan_to_num_(0).clamp_(0, OTSU_BINS - 1).long()
    bins.add_(map_of_pixel, alpha=OTSU_BINS)
    counts = torch.zeros(maps * OTSU_BINS, dtype=torch.int32, device=values.device)
    counts.scatter_add_(0, bins, counts.new_ones(1).expand(len(bins)))
    return otsu_of_counts(counts.reshape(maps, OTSU_BINS))


def _changes(
    masks: Bool[Tensor, "kinds pixels"], layout: FlatLayout
) -> tuple[Int32[Tensor, " changes"], Int32[Tensor, " masks"]]:
    """Return the positions at which masks change, each in its own frame, and the number of each mask's."""
    kinds, pixels = masks.shape
    starts = torch.cat([layout.starts.long() + kind * pixels for kind in range(kinds)])
    flat = masks.flatten()
    before = flat.roll(1).index_fill_(0, starts, value=False)
    positions = (flat ^ before).nonzero().flatten()
    bounds = torch.searchsorted(positions, starts)
    counts = torch.diff(bounds, append=bounds.new_full((1,), len(positions)))
    owner = torch.searchsorted(starts, positions, right=True) - 1
    return (positions - starts[owner]).int(), counts.int()
