"""Split the masks of a sample's rows into instances, for the column `instances`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from legrad.heatmaps import heatmap_columns
from legrad.masks.instances import (
    CELLS_PER_PATCH,
    EncodedInstances,
    Splitting,
    encode_instances,
    instances_of_labels,
    split_mask,
)
from legrad.masks.rle import Rle, decode_rle
from pipeline.annotate.sample_states import SampleMaps
from pipeline.output.schema import AnnotationRow, InstanceRow, SplitAnnotationRow


def with_instances(
    rows: Sequence[AnnotationRow], map_numbers: Sequence[int], maps: SampleMaps, splitting: Splitting
) -> list[AnnotationRow]:
    """Return the rows of a sample with the column `instances`: null without a mask, else a list.

    Args:
        rows: rows of one sample.
        map_numbers: for each row, which of the maps is its own.
        maps: the maps of the sample.
        splitting: which peaks are instances.
    """
    # equal prompts share a map, and often a mask
    known: dict[tuple[int, str], list[InstanceRow]] = {}
    split: list[AnnotationRow] = []
    for row, number in zip(rows, map_numbers, strict=True):
        instances: list[InstanceRow] | None = None
        if row["mask"] is not None:
            mask: Rle = {"size": row["mask"]["size"], "counts": row["mask"]["counts"]}
            key = (number, mask["counts"])
            if key not in known:
                known[key] = _as_rows(_instances(mask, number, maps, splitting))
            instances = known[key]
        split_row: SplitAnnotationRow = {**row, "instances": instances}
        split.append(split_row)
    return split


def _instances(rle: Rle, number: int, maps: SampleMaps, splitting: Splitting) -> EncodedInstances:
    height, width = rle["size"]
    mask, heat = decode_rle(rle, max_pixels=height * width), _heatmap(maps, number)
    if maps.instance_labels is not None:
        return encode_instances(instances_of_labels(maps.instance_labels[number], mask, heat))
    grid_height, grid_width = maps.relevance_grids.shape[1:]
    return encode_instances(split_mask(mask, heat, (grid_height, grid_width), splitting))


def _heatmap(maps: SampleMaps, number: int) -> Float32[np.ndarray, "rows columns"]:
    """Return a map from 0 to 1, in a frame that is fine enough to be split."""
    kept: np.ndarray = maps.cut_maps[number].astype(np.float32)
    if maps.normalisation is None:
        return kept
    height, width = (CELLS_PER_PATCH * cells for cells in kept.shape)
    return heatmap_columns(kept, height, width, maps.normalisation).T


def _as_rows(instances: EncodedInstances) -> list[InstanceRow]:
    columns = zip(
        instances.areas.tolist(),
        instances.bboxes_xywh.tolist(),
        instances.scores.tolist(),
        instances.rles,
        strict=True,
    )
    return [
        {"area": area, "bbox_xywh": bbox_xywh, "score": score, "mask": rle}
        for area, bbox_xywh, score, rle in columns
    ]
