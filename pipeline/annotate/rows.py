"""Turn the maps of a sample into masks, and these into the rows of its shard."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from legrad.masks.competition import Contestants, competing_masks
from legrad.masks.grids import HeatmapStack, ImageMasks, independent_masks, masks_of_runs
from legrad.masks.rle import Rle
from pipeline.annotate.cutting import cleaning_of, mask_rule, splitting_of
from pipeline.annotate.filters import STATUSES
from pipeline.annotate.instance_rows import with_instances
from pipeline.annotate.map_rows import with_maps
from pipeline.annotate.sample_states import ExplainedSample, SampleMaps
from pipeline.config.masks import MasksConfig
from pipeline.config.schema import JobConfig
from pipeline.output.label_map import mask_frame
from pipeline.output.schema import ACCEPTED, EMPTY_MASK, OK, AnnotationRow
from pipeline.shards.sample_error import SampleError


@dataclass(frozen=True)
class SampleRows:
    """What a sample adds to the files of its shard: rows, error rows, or neither where no prompt applies.

    Attributes:
        rows: of the annotations file.
        errors: of the errors file.
        dropped_prompts: prompts omitted because the sample had too many.
        is_sample: False for an error of the shard that belongs to no sample.
    """

    rows: tuple[AnnotationRow, ...] = ()
    errors: tuple[SampleError, ...] = ()
    dropped_prompts: int = 0
    is_sample: bool = True


@dataclass(frozen=True)
class _Frame:
    """Where and how the masks of a sample are made."""

    explained: ExplainedSample
    config: MasksConfig

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return mask_frame(self.explained.image_height, self.explained.image_width, self.config.max_side)

    def independent_masks(self, numbers: Sequence[int]) -> ImageMasks:
        """Return the masks of some of the maps, each cut by itself."""
        if (runs := self.explained.maps.runs) is not None:
            return masks_of_runs([runs[number] for number in numbers], *self.size)
        heatmaps = self.of_maps(numbers).heatmaps
        return independent_masks(heatmaps, mask_rule(self.config), cleaning_of(self.config))

    def of_backgrounds(self) -> Contestants:
        """Return the heat maps of the background texts whose grids are finite, and the peaks of the grids."""
        maps = self.explained.maps
        return self.of_maps([number for number in _finite_maps(maps) if number >= maps.prompt_maps])

    def of_maps(self, numbers: Sequence[int]) -> Contestants:
        """Return the heat maps of some of the maps, and the peaks of their grids."""
        maps = self.explained.maps
        kept = _rows_at(maps.cut_maps, numbers)
        if kept.dtype == np.float16:
            # NumPy takes fifteen times as long; copied, as torch wants arrays that it may write to
            kept = torch.from_numpy(kept.copy()).float().numpy()
        heatmaps = HeatmapStack(kept, *self.size, normalisation=maps.normalisation)
        return Contestants(heatmaps, maps.peaks[list(numbers)])


@dataclass(frozen=True)
class _Mask:
    """The columns of a row that describe its mask; by default those of a prompt without a mask."""

    threshold: float | None = None
    threshold_low: float | None = None
    area: int = 0
    bbox_xywh: list[float] | None = None
    rle: Rle | None = None
    ignore: Rle | None = None


NO_MASK = _Mask()


def sample_rows(explained: ExplainedSample, config: JobConfig) -> SampleRows:
    """Turn an explained sample into its rows; prompts without a finite map become errors.

    Args:
        explained: the sample after the device step.
        config: see `annotation_rows`.
    """
    rows = tuple(annotation_rows(explained, config))
    finite = _finite_maps(explained.maps)
    message = "the relevance map is not finite"
    not_finite = [
        SampleError("model", "non_finite", message, explained.key, explained.index, kept.index)
        for kept, number in zip(explained.prompts, explained.maps.map_of_prompt.tolist(), strict=True)
        if number not in finite
    ]
    return SampleRows(rows, (*explained.errors, *not_finite), explained.dropped_prompts)


def annotation_rows(explained: ExplainedSample, config: JobConfig) -> list[AnnotationRow]:
    """Turn the maps of a sample into rows, in the order of its prompts; those without finite maps have none.

    Prompts that a filter rejected on the device get no mask and no threshold, and do not compete. The pixels
    won by a prompt that is then rejected for its area go to the others. Accepted prompts without a
    pixel are `empty_mask`: they have a mask of zeros.

    Args:
        explained: the sample after the device step.
        config: `masks` says how masks are made and which are too small; `output` what the rows hold.
    """
    maps = explained.maps
    peaks = _finite_peaks(maps)
    map_of_prompt: list[int] = maps.map_of_prompt.tolist()
    status_by_position = {
        position: OK if maps.rejections is None else STATUSES[maps.rejections[number]]
        for position, number in enumerate(map_of_prompt)
        if number in peaks
    }
    contestants = [position for position, status in status_by_position.items() if status == OK]
    frame = _Frame(explained, config.masks)
    make = _competing if config.masks.combine == "argmax" else _independent
    masks, too_small = make(frame, contestants)
    empty = [position for position, mask in masks.items() if not mask.area]
    status_by_position |= dict.fromkeys(empty, EMPTY_MASK) | dict.fromkeys(too_small, "rejected_area")
    written = {
        position: status
        for position, status in status_by_position.items()
        if status in ACCEPTED or config.rows_written == "all"
    }
    numbers = [map_of_prompt[position] for position in written]
    rows = [
        _row(explained, position, status, peaks[number], masks.get(position, NO_MASK))
        for (position, status), number in zip(written.items(), numbers, strict=True)
    ]
    if config.output.heatmap:
        rows = with_maps(rows, numbers, maps, explained.context)
    splitting = splitting_of(config.masks)
    return rows if splitting is None else with_instances(rows, numbers, maps, splitting)


def _finite_peaks(maps: SampleMaps) -> dict[int, float]:
    """Return the maximum of each raw grid that is finite, by the number of its map."""
    finite = _finite_maps(maps)
    peaks: list[float] = _rows_at(maps.relevance_grids, finite).max(axis=(1, 2)).tolist()
    return dict(zip(finite, peaks, strict=True))


def _finite_maps(maps: SampleMaps) -> list[int]:
    """Return the numbers of the maps whose grids have neither NaN nor infinity."""
    is_finite = np.isfinite(maps.relevance_grids)
    if is_finite.all():
        return list(range(len(is_finite)))
    numbers: list[int] = np.flatnonzero(is_finite.all(axis=(1, 2))).tolist()
    return numbers


def _rows_at(array: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """Return some rows of an array, without a copy where these are all rows."""
    return array if list(rows) == list(range(len(array))) else array[list(rows)]


def _independent(frame: _Frame, positions: Sequence[int]) -> tuple[dict[int, _Mask], list[int]]:
    """Cut each prompt by itself; return the masks by position, and the positions of those too small."""
    map_of_prompt: list[int] = frame.explained.maps.map_of_prompt.tolist()
    # equal prompts share a map, which is cut once
    numbers = list(dict.fromkeys(map_of_prompt[position] for position in positions))
    image_masks = frame.independent_masks(numbers)
    by_number = _masks_of(numbers, image_masks, image_masks.ignores)
    masks = {position: by_number[map_of_prompt[position]] for position in positions}
    return masks, _too_small(frame, masks)


def _competing(frame: _Frame, positions: Sequence[int]) -> tuple[dict[int, _Mask], list[int]]:
    """Let prompts compete; return the masks by position, and the positions of those dropped as too small."""
    rejected: list[int] = []
    backgrounds, rule, cleaning = frame.of_backgrounds(), mask_rule(frame.config), cleaning_of(frame.config)
    while True:
        live = [position for position in positions if position not in rejected]
        prompts = frame.of_maps(frame.explained.maps.map_of_prompt[live].tolist())
        image_masks = competing_masks(prompts, backgrounds, rule, cleaning)
        # one for the image, on every row: in a single row, what is unknown must not look like background
        masks = _masks_of(live, image_masks, list(image_masks.ignores) * len(live))
        too_small = _too_small(frame, masks)
        if not too_small:
            return masks, rejected
        rejected += too_small


def _masks_of(keys: Sequence[int], masks: ImageMasks, ignores: Sequence[Rle]) -> dict[int, _Mask]:
    """Return the masks of an image by the given keys, one key for each mask."""
    boxes: list[list[float]] = masks.bboxes_xywh.tolist()
    areas: list[int] = masks.areas.tolist()
    nothing: list[None] = [None] * len(keys)
    thresholds = nothing if masks.thresholds is None else masks.thresholds.tolist()
    lows = nothing if masks.thresholds_low is None else masks.thresholds_low.tolist()
    columns = zip(thresholds, lows, areas, boxes, masks.rles, ignores or nothing, strict=True)
    return dict(zip(keys, itertools.starmap(_Mask, columns), strict=True))


def _too_small(frame: _Frame, masks: Mapping[int, _Mask]) -> list[int]:
    if not frame.config.min_area:
        return []
    height, width = frame.size
    min_share = frame.config.min_area
    return [position for position, mask in masks.items() if mask.area / (height * width) < min_share]


def _row(
    explained: ExplainedSample,
    position: int,
    status: str,
    peak: float,
    mask: _Mask,
) -> AnnotationRow:
    kept = explained.prompts[position]
    if status not in ACCEPTED:
        mask = _Mask(mask.threshold, mask.threshold_low)
    return {
        "key": explained.key,
        "sample_index": explained.index,
        "prompt_index": kept.index,
        "prompt": kept.text,
        "prompt_truncated": kept.truncated,
        "class_id": kept.class_id,
        "status": status,
        "image_height": explained.image_height,
        "image_width": explained.image_width,
        "similarity": kept.similarity,
        "peak": peak,
        "threshold": mask.threshold,
        "threshold_low": mask.threshold_low,
        "area": mask.area,
        "bbox_xywh": mask.bbox_xywh,
        "mask": mask.rle,
        "ignore": mask.ignore,
        "heatmap": None,
        "heatmap_height": None,
        "heatmap_width": None,
    }
