"""The annotation rows of one explained sample: its grids become masks, accepted or rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from legrad.heatmaps import Normalisation
from legrad.masks.cleaning import Cleaning
from legrad.masks.competition import Contestants, competing_masks
from legrad.masks.grids import HeatmapStack, ImageMasks, independent_masks
from legrad.masks.rle import Rle
from legrad.masks.thresholds import MaskRule, relevance_contrast
from pipeline.annotate.engine import ExplainedSample
from pipeline.config.masks import MasksConfig
from pipeline.config.schema import JobConfig
from pipeline.output.label_map import mask_frame
from pipeline.output.schema import ACCEPTED, EMPTY_MASK, OK

# A sample's neighbours in its batch move a score by a rounding error; one that stands at a limit but for
# that is within it, always.
SIMILARITY_ROUNDING = 1e-5
RELATIVE_ROUNDING = 1e-5


@dataclass(frozen=True)
class _Frame:
    """Where and how the masks of a sample are made."""

    explained: ExplainedSample
    config: MasksConfig
    normalisation: Normalisation

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        image = self.explained.sample.image
        return mask_frame(image.image_height, image.image_width, self.config.max_side)

    @property
    def rule(self) -> MaskRule:
        """Where heat maps are cut."""
        masks = self.config
        return MaskRule(masks.rule, masks.value, masks.quantile, masks.low, masks.high, masks.band_center)

    @property
    def cleaning(self) -> Cleaning:
        """What is done to maps and masks besides."""
        return Cleaning(self.config.smooth, self.config.min_component, self.config.max_hole)

    def of_prompts(self, positions: Sequence[int]) -> Contestants:
        """Heat maps of some of the prompts, and the peak of each one's grid."""
        return self._stack(self.explained.relevance_grids, positions, first_refined=0)

    def of_backgrounds(self) -> Contestants:
        """The same of the background texts; those that are not finite compete with nobody."""
        grids = self.explained.background_grids
        positions = _finite(grids).nonzero().flatten().tolist()
        return self._stack(grids, positions, first_refined=len(self.explained.prompts))

    def _stack(self, grids: torch.Tensor, positions: Sequence[int], first_refined: int) -> Contestants:
        kept = grids[list(positions)]
        if self.explained.neutral_patches is not None and len(kept):
            kept = kept.masked_fill(self.explained.neutral_patches, 0)
        peaks = kept.amax((1, 2)) if len(kept) else torch.zeros(0)
        heatmaps = self._heatmaps(kept, [first_refined + position for position in positions])
        return Contestants(heatmaps, peaks)

    def _heatmaps(self, grids: torch.Tensor, refined_rows: Sequence[int]) -> HeatmapStack:
        refined, smooth = self.explained.refined_maps, self.config.smooth
        if refined is None:
            return HeatmapStack(grids, *self.size, self.normalisation, (smooth, smooth))
        grid_height, grid_width = self.explained.relevance_grids.shape[1:]
        per_patch = (refined.shape[1] / grid_height, refined.shape[2] / grid_width)
        return HeatmapStack(
            refined[list(refined_rows)],
            *self.size,
            normalisation=None,
            smooth=(smooth * per_patch[0], smooth * per_patch[1]),
        )


@dataclass(frozen=True)
class _Made:
    """The masks of a sample.

    Attributes:
        columns: of each prompt that has a mask, by its position in the sample.
        area_shares: the share of the frame that each of them covers.
    """

    columns: Mapping[int, dict[str, Any]]
    area_shares: Mapping[int, float]


def annotation_rows(
    explained: ExplainedSample, config: JobConfig, normalisation: Normalisation
) -> list[dict[str, Any]]:
    """Turn one sample's grids into rows, in its prompts' order; prompts without finite grids have none.

    Prompts rejected by similarity, peak or contrast are not cut, so they have no threshold, and compete with
    nobody. What a prompt had won that is rejected for its area falls to the others. Accepted prompts without
    a pixel are `empty_mask`: they have a mask of zeros.

    Args:
        explained: what the device step says of the sample.
        config: ``masks`` says how masks are made and which are rejected; ``output`` what the rows hold.
        normalisation: when the model family's maps are brought to [0, 1].
    """
    status_by_position = _statuses_before_masks(explained, config.masks)
    contestants = [position for position, status in status_by_position.items() if status == OK]
    frame = _Frame(explained, config.masks, normalisation)
    make = _competing if config.masks.combine == "argmax" else _independent
    made, too_small = make(frame, contestants)
    empty = [position for position, column in made.columns.items() if not column["area"]]
    status_by_position |= dict.fromkeys(empty, EMPTY_MASK) | dict.fromkeys(too_small, "rejected_area")
    return [
        _row(explained, position, status, made, with_heatmap=config.output.heatmap)
        for position, status in status_by_position.items()
        if status in ACCEPTED or config.rows_written == "all"
    ]


def finite_prompts(explained: ExplainedSample) -> torch.Tensor:
    """Which prompts have a grid without NaN and infinity: bool [prompts]."""
    return _finite(explained.relevance_grids)


def _finite(grids: torch.Tensor) -> torch.Tensor:
    return grids.isfinite().flatten(1).all(dim=1)


def _statuses_before_masks(explained: ExplainedSample, masks: MasksConfig) -> dict[int, str]:
    """Position of each finite prompt to its status, as far as it is known without a mask."""
    positions: list[int] = finite_prompts(explained).nonzero().flatten().tolist()
    grids = explained.relevance_grids[positions]
    contrasts = [0.0] * len(grids) if masks.min_contrast is None else relevance_contrast(grids).tolist()
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


def _independent(frame: _Frame, positions: Sequence[int]) -> tuple[_Made, list[int]]:
    """Masks of prompts that do not know of each other, and which of them are too small."""
    masks = independent_masks(frame.of_prompts(positions).heatmaps, frame.rule, frame.cleaning)
    made = _made(frame, positions, masks, masks.ignores)
    return made, _too_small(frame, made)


def _competing(frame: _Frame, positions: Sequence[int]) -> tuple[_Made, list[int]]:
    """Masks of prompts that share out the image, and which had to leave it because theirs were too small."""
    rejected: list[int] = []
    backgrounds = frame.of_backgrounds()
    while True:
        live = [position for position in positions if position not in rejected]
        masks = competing_masks(frame.of_prompts(live), backgrounds, frame.rule, frame.cleaning)
        # one for the image: whoever reads a single row must not take what is unknown for background
        made = _made(frame, live, masks, list(masks.ignores) * len(live))
        too_small = _too_small(frame, made)
        if not too_small:
            return made, rejected
        rejected += too_small


def _made(
    frame: _Frame,
    positions: Sequence[int],
    masks: ImageMasks,
    ignores: Sequence[Rle],
) -> _Made:
    height, width = frame.size
    columns = {
        position: {
            "threshold": None if masks.thresholds is None else float(masks.thresholds[ordinal]),
            "threshold_low": None if masks.thresholds_low is None else float(masks.thresholds_low[ordinal]),
            "area": int(masks.areas[ordinal]),
            "bbox_xywh": masks.bboxes_xywh[ordinal].tolist(),
            "mask": masks.rles[ordinal],
            "ignore": ignores[ordinal] if ignores else None,
        }
        for ordinal, position in enumerate(positions)
    }
    shares = {position: column["area"] / (height * width) for position, column in columns.items()}
    return _Made(columns, shares)


def _too_small(frame: _Frame, made: _Made) -> list[int]:
    min_area = frame.config.min_area
    if min_area is None:
        return []
    return [position for position, share in made.area_shares.items() if share < min_area]


def _row(
    explained: ExplainedSample, position: int, status: str, made: _Made, *, with_heatmap: bool
) -> dict[str, Any]:
    sample, kept = explained.sample, explained.prompts[position]
    grid = explained.relevance_grids[position]
    peak = float(grid.max())
    columns = made.columns.get(position, {})
    if status not in ACCEPTED:
        columns = {name: columns.get(name) for name in ("threshold", "threshold_low")}
        columns |= {"area": 0, "bbox_xywh": None, "mask": None, "ignore": None}
    return {
        "key": sample.key,
        "sample_index": sample.index,
        "prompt_index": kept.prompt.index,
        "prompt": kept.prompt.text,
        "prompt_truncated": kept.truncated,
        "class_id": kept.prompt.class_id,
        "status": status,
        "image_height": sample.image.image_height,
        "image_width": sample.image.image_width,
        "similarity": kept.similarity,
        "peak": peak,
        **columns,
        **(_heatmap_columns(grid, peak) if with_heatmap else {}),
    }


def _heatmap_columns(relevance_grid: torch.Tensor, peak: float) -> dict[str, Any]:
    scaled = relevance_grid.numpy() / (peak or 1.0) * 255
    grid_height, grid_width = relevance_grid.shape
    return {
        "heatmap": np.rint(scaled).astype(np.uint8).tobytes(),
        "heatmap_height": grid_height,
        "heatmap_width": grid_width,
    }
