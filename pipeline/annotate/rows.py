"""Turn the maps of a sample into masks, and these into the rows of its shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from legrad.masks.cleaning import Cleaning
from legrad.masks.competition import Contestants, competing_masks
from legrad.masks.grids import HeatmapStack, ImageMasks, independent_masks
from legrad.masks.rle import Rle
from legrad.masks.thresholds import MaskRule, relevance_contrast
from pipeline.annotate.sample_states import ExplainedSample, SampleMaps
from pipeline.config.masks import MasksConfig
from pipeline.config.schema import JobConfig
from pipeline.output.label_map import mask_frame
from pipeline.output.schema import ACCEPTED, EMPTY_MASK, OK, AnnotationRow
from pipeline.output.writer import ShardWriter
from pipeline.shards.sample_error import SampleError

# A sample's neighbours in its batch move a score by a rounding error; a score that misses a limit by no more
# than that is always within it.
SIMILARITY_ROUNDING = 1e-5
RELATIVE_ROUNDING = 1e-5


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

    def add_to(self, writer: ShardWriter) -> None:
        """Record the rows and errors."""
        if self.is_sample:
            writer.add_sample(self.rows, self.errors, self.dropped_prompts)
        else:
            for error in self.errors:
                writer.add_error(error)


@dataclass(frozen=True)
class _Frame:
    """Where and how the masks of a sample are made."""

    explained: ExplainedSample
    config: MasksConfig

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return mask_frame(self.explained.image_height, self.explained.image_width, self.config.max_side)

    @property
    def rule(self) -> MaskRule:
        """Where heat maps are cut."""
        masks = self.config
        return MaskRule(masks.rule, masks.value, masks.quantile, masks.low, masks.high, masks.band_center)

    @property
    def cleaning(self) -> Cleaning:
        """How maps are smoothed, and specks and holes removed from masks."""
        return Cleaning(self.config.smooth, self.config.min_component, self.config.max_hole)

    def of_prompts(self, positions: Sequence[int]) -> Contestants:
        """Return the heat maps of some of the prompts, and the peak of each one's grid."""
        return self.of_maps(self.explained.maps.map_of_prompt[list(positions)].tolist())

    def of_backgrounds(self) -> Contestants:
        """Return the same of the background texts whose grids are finite."""
        maps = self.explained.maps
        return self.of_maps([number for number in _finite_maps(maps) if number >= maps.prompt_maps])

    def of_maps(self, numbers: Sequence[int]) -> Contestants:
        """Return the same of some of the maps."""
        maps, kept, smooth = self.explained.maps, list(numbers), self.config.smooth
        rows_per_cell, columns_per_cell = (
            pixels / cells
            for pixels, cells in zip(maps.cut_maps.shape[1:], maps.relevance_grids.shape[1:], strict=True)
        )
        heatmaps = HeatmapStack(
            torch.from_numpy(maps.cut_maps[kept]),
            *self.size,
            normalisation=maps.normalisation,
            smooth=(smooth * rows_per_cell, smooth * columns_per_cell),
        )
        return Contestants(heatmaps, torch.from_numpy(maps.peaks[kept]))


@dataclass(frozen=True)
class _Mask:
    """The columns of a row that describe its mask; by default those of a prompt without a mask."""

    threshold: float | None = None
    threshold_low: float | None = None
    area: int = 0
    bbox_xywh: list[float] | None = None
    rle: Rle | None = None
    ignore: Rle | None = None


def sample_rows(explained: ExplainedSample, config: JobConfig) -> SampleRows:
    """Turn an explained sample into its rows; prompts without a finite map become errors.

    Args:
        explained: the sample after the device step.
        config: see `annotation_rows`.
    """
    finite = set(_finite_positions(explained.maps))
    message = "the relevance map is not finite"
    not_finite = [
        SampleError("model", "non_finite", message, explained.key, explained.index, kept.prompt.index)
        for position, kept in enumerate(explained.prompts)
        if position not in finite
    ]
    return SampleRows(
        tuple(annotation_rows(explained, config)),
        (*explained.errors, *not_finite),
        explained.dropped_prompts,
    )


def annotation_rows(explained: ExplainedSample, config: JobConfig) -> list[AnnotationRow]:
    """Turn the maps of a sample into rows, in the order of its prompts; those without finite maps have none.

    Prompts rejected by similarity, peak or contrast get no mask and no threshold, and do not compete. The
    pixels won by a prompt that is then rejected for its area go to the others. Accepted prompts without a
    pixel are `empty_mask`: they have a mask of zeros.

    Args:
        explained: the sample after the device step.
        config: `masks` says how masks are made and which are rejected; `output` what the rows hold.
    """
    status_by_position = _statuses_before_masks(explained, config.masks)
    contestants = [position for position, status in status_by_position.items() if status == OK]
    frame = _Frame(explained, config.masks)
    make = _competing if config.masks.combine == "argmax" else _independent
    masks, too_small = make(frame, contestants)
    empty = [position for position, mask in masks.items() if not mask.area]
    status_by_position |= dict.fromkeys(empty, EMPTY_MASK) | dict.fromkeys(too_small, "rejected_area")
    return [
        _row(explained, position, status, masks.get(position, _Mask()), with_heatmap=config.output.heatmap)
        for position, status in status_by_position.items()
        if status in ACCEPTED or config.rows_written == "all"
    ]


def _finite_maps(maps: SampleMaps) -> list[int]:
    """Return the numbers of the maps whose grids have neither NaN nor infinity."""
    numbers: list[int] = np.flatnonzero(np.isfinite(maps.relevance_grids).all(axis=(1, 2))).tolist()
    return numbers


def _finite_positions(maps: SampleMaps) -> list[int]:
    """Return the positions of the prompts whose grids have neither NaN nor infinity."""
    finite = set(_finite_maps(maps))
    return [position for position, number in enumerate(maps.map_of_prompt.tolist()) if number in finite]


def _statuses_before_masks(explained: ExplainedSample, masks: MasksConfig) -> dict[int, str]:
    """Return the status of each finite prompt by its position, as far as it is known without a mask."""
    maps = explained.maps
    positions = _finite_positions(maps)
    grids = maps.relevance_grids[maps.map_of_prompt[positions]]
    no_limit = [0.0] * len(grids)
    contrasts = (
        no_limit if masks.min_contrast is None else relevance_contrast(torch.from_numpy(grids)).tolist()
    )
    return {
        position: _status(masks, explained.prompts[position].similarity, float(grid.max()), contrast)
        for position, grid, contrast in zip(positions, grids, contrasts, strict=True)
    }


def _status(masks: MasksConfig, similarity: float, peak: float, contrast: float) -> str:
    if masks.min_similarity is not None and similarity < masks.min_similarity - SIMILARITY_ROUNDING:
        return "rejected_similarity"
    if masks.min_peak is not None and peak < masks.min_peak * (1 - RELATIVE_ROUNDING):
        return "rejected_peak"
    if masks.min_contrast is not None and contrast < masks.min_contrast * (1 - RELATIVE_ROUNDING):
        return "rejected_contrast"
    return OK


def _independent(frame: _Frame, positions: Sequence[int]) -> tuple[dict[int, _Mask], list[int]]:
    """Cut each prompt by itself; return the masks by position, and the positions of those too small."""
    image_masks = independent_masks(frame.of_prompts(positions).heatmaps, frame.rule, frame.cleaning)
    masks = _by_position(positions, image_masks, image_masks.ignores)
    return masks, _too_small(frame, masks)


def _competing(frame: _Frame, positions: Sequence[int]) -> tuple[dict[int, _Mask], list[int]]:
    """Let prompts compete; return the masks by position, and the positions of those dropped as too small."""
    rejected: list[int] = []
    backgrounds = frame.of_backgrounds()
    while True:
        live = [position for position in positions if position not in rejected]
        image_masks = competing_masks(frame.of_prompts(live), backgrounds, frame.rule, frame.cleaning)
        # one for the image, on every row: in a single row, what is unknown must not look like background
        masks = _by_position(live, image_masks, list(image_masks.ignores) * len(live))
        too_small = _too_small(frame, masks)
        if not too_small:
            return masks, rejected
        rejected += too_small


def _by_position(positions: Sequence[int], masks: ImageMasks, ignores: Sequence[Rle]) -> dict[int, _Mask]:
    return {
        position: _Mask(
            threshold=None if masks.thresholds is None else float(masks.thresholds[ordinal]),
            threshold_low=None if masks.thresholds_low is None else float(masks.thresholds_low[ordinal]),
            area=int(masks.areas[ordinal]),
            bbox_xywh=masks.bboxes_xywh[ordinal].tolist(),
            rle=masks.rles[ordinal],
            ignore=ignores[ordinal] if ignores else None,
        )
        for ordinal, position in enumerate(positions)
    }


def _too_small(frame: _Frame, masks: Mapping[int, _Mask]) -> list[int]:
    height, width = frame.size
    min_share = frame.config.min_area or 0
    return [position for position, mask in masks.items() if mask.area / (height * width) < min_share]


def _row(
    explained: ExplainedSample, position: int, status: str, mask: _Mask, *, with_heatmap: bool
) -> AnnotationRow:
    kept = explained.prompts[position]
    grid = explained.maps.relevance_grids[explained.maps.map_of_prompt[position]]
    if status not in ACCEPTED:
        mask = _Mask(mask.threshold, mask.threshold_low)
    return {
        "key": explained.key,
        "sample_index": explained.index,
        "prompt_index": kept.prompt.index,
        "prompt": kept.prompt.text,
        "prompt_truncated": kept.truncated,
        "class_id": kept.prompt.class_id,
        "status": status,
        "image_height": explained.image_height,
        "image_width": explained.image_width,
        "similarity": kept.similarity,
        "peak": float(grid.max()),
        "threshold": mask.threshold,
        "threshold_low": mask.threshold_low,
        "area": mask.area,
        "bbox_xywh": mask.bbox_xywh,
        "mask": mask.rle,
        "ignore": mask.ignore,
        "heatmap": _quantised(grid) if with_heatmap else None,
        "heatmap_height": grid.shape[0] if with_heatmap else None,
        "heatmap_width": grid.shape[1] if with_heatmap else None,
    }


def _quantised(relevance_grid: np.ndarray) -> bytes:
    """Return a grid in steps of 1/255 of its peak."""
    scaled = relevance_grid / (float(relevance_grid.max()) or 1.0) * 255
    return np.rint(scaled).astype(np.uint8).tobytes()
