"""Inputs of the pictures of annotation rows: samples read from their shard, heat maps, IoU."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from legrad.heatmaps import heatmap_columns, minmax_normalise
from legrad.quality.metrics import foreground_iou
from pipeline import storage
from pipeline.config.masks import MasksConfig
from pipeline.config.schema import InputConfig
from pipeline.output.label_map import in_frame
from pipeline.output.stored_grids import stored_grid
from pipeline.shards.ground_truth import LABEL_MAP_FIELD
from pipeline.shards.samples import RawSample, read_samples
from pipeline.storage import ShardSource

Row = Mapping[str, Any]


def read_samples_at(
    shard: ShardSource, indices: Collection[int], settings: InputConfig
) -> Iterator[RawSample]:
    """Read the image and the ground truth of samples by their ordinals; reading stops after the last one.

    Raises:
        ShardError: the shard cannot be opened or read.
    """
    left: set[int | None] = set(indices)
    wanted = [*settings.image.split(";"), LABEL_MAP_FIELD, "json"]
    with storage.open_shard(shard) as stream:
        samples = read_samples(stream, max_member_bytes=settings.max_member_bytes, wanted_fields=wanted)
        for sample in samples:
            if isinstance(sample, RawSample) and sample.index in left:
                yield sample
            ordinal = sample.index if isinstance(sample, RawSample) else sample.sample_index
            left.discard(ordinal)
            if not left:
                return


def stored_heatmap(row: Row) -> Float[np.ndarray, "grid_height grid_width"] | None:
    """Return the stored relevance grid, normalised to the range from 0 to 1; None where none was stored."""
    if row["heatmap"] is None:
        return None
    grid = stored_grid(row["heatmap"], row["heatmap_height"], row["heatmap_width"])
    heatmap: np.ndarray = minmax_normalise(torch.from_numpy(grid)).numpy()
    return heatmap


def mask_iou(
    mask: Bool[np.ndarray, "mask_height mask_width"],
    truth: Bool[np.ndarray, "height width"],
    valid: Bool[np.ndarray, "height width"],
) -> float:
    """Return the foreground IoU of a mask, in any frame, with ground truth over the valid pixels."""
    return float(foreground_iou(in_frame(mask, truth.shape)[None], truth[None], valid[None])[0])


def cut_of(threshold: float | None, masks: MasksConfig) -> float | None:
    """Return the threshold of a row of a job; None where neither the row nor the rule names it."""
    if threshold is not None:
        return threshold
    return masks.value if masks.rule == "fixed" else None


def preview_iou(
    slider_map: Float[np.ndarray, "map_height map_width"], mask: Bool[np.ndarray, "rows columns"], cut: float
) -> float:
    """Return the IoU of a job's mask with a map above a threshold; 1 if both are empty."""
    height, width = mask.shape
    above = cut < heatmap_columns(np.ascontiguousarray(slider_map, np.float32), height, width, None).T
    union = int((above | mask).sum())
    return int((above & mask).sum()) / union if union else 1.0
