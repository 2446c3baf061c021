"""The annotation rows of one explained sample: its grids become masks, accepted or rejected."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from legrad.masks import ImageMasks, MaskRule, Normalisation, grid_to_masks
from pipeline.config import JobConfig, MasksConfig
from pipeline.engine import ExplainedSample


def annotation_rows(
    explained: ExplainedSample, config: JobConfig, normalisation: Normalisation
) -> list[dict[str, Any]]:
    """Turn one sample's grids into rows, in its prompts' order; prompts without finite grids have none.

    Args:
        explained: what the device step says of the sample.
        config: ``masks`` says how masks are made and which are rejected; ``output`` what the rows hold.
        normalisation: when the model family's maps are brought to [0, 1].
    """
    positions = finite_prompts(explained).nonzero().flatten()
    if not len(positions):
        return []
    sample = explained.sample
    grids = explained.relevance_grids[positions]
    height, width = mask_frame(sample.image.image_height, sample.image.image_width, config.masks.max_side)
    rule = MaskRule(config.masks.rule, config.masks.value)
    masks = grid_to_masks(grids, height, width, rule, normalisation=normalisation)
    rows = []
    for row, position in enumerate(positions.tolist()):
        kept = explained.prompts[position]
        peak = float(grids[row].max())
        status = _status(config.masks, kept.similarity, peak, int(masks.areas[row]) / (height * width))
        if status != "ok" and config.rows_written == "accepted":
            continue
        rows.append(
            {
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
                "threshold": float(masks.thresholds[row]),
                **_mask_columns(masks, row, accepted=status == "ok"),
                **(_heatmap_columns(grids[row], peak) if config.output.heatmap else {}),
            }
        )
    return rows


def finite_prompts(explained: ExplainedSample) -> torch.Tensor:
    """Which prompts have a grid without NaN and infinity: bool [prompts]."""
    return explained.relevance_grids.isfinite().flatten(1).all(dim=1)


def mask_frame(image_height: int, image_width: int, max_side: int | None) -> tuple[int, int]:
    """Height and width of the masks: the image's own, or scaled down to a longest side of `max_side`."""
    longest = max(image_height, image_width)
    if max_side is None or longest <= max_side:
        return image_height, image_width
    return max(1, round(image_height * max_side / longest)), max(1, round(image_width * max_side / longest))


def _status(masks: MasksConfig, similarity: float, peak: float, area_share: float) -> str:
    if masks.min_similarity is not None and similarity < masks.min_similarity:
        return "rejected_similarity"
    if masks.min_peak is not None and peak < masks.min_peak:
        return "rejected_peak"
    if masks.min_area is not None and area_share < masks.min_area:
        return "rejected_area"
    return "ok"


def _mask_columns(masks: ImageMasks, row: int, *, accepted: bool) -> dict[str, Any]:
    if not accepted:
        return {"area": 0, "bbox_xywh": None, "mask": None}
    return {
        "area": int(masks.areas[row]),
        "bbox_xywh": masks.bboxes_xywh[row].tolist(),
        "mask": masks.rles[row],
    }


def _heatmap_columns(relevance_grid: torch.Tensor, peak: float) -> dict[str, Any]:
    scaled = relevance_grid.numpy() / (peak or 1.0) * 255
    grid_height, grid_width = relevance_grid.shape
    return {
        "heatmap": np.rint(scaled).astype(np.uint8).tobytes(),
        "heatmap_height": grid_height,
        "heatmap_width": grid_width,
    }
