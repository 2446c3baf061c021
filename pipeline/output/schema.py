"""What is written: the Parquet schemas as constants, and the rows that fill them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

RLE_TYPE = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])

# of this package's part of a Parquet file's footer
METADATA_KEY = b"legrad"

ANNOTATION_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("sample_index", pa.int32()),
        ("shard", pa.string()),
        ("prompt_index", pa.int16()),
        ("prompt", pa.string()),
        ("prompt_truncated", pa.bool_()),
        ("class_id", pa.int32()),
        ("status", pa.string()),
        ("image_height", pa.int32()),
        ("image_width", pa.int32()),
        ("similarity", pa.float32()),
        ("peak", pa.float32()),
        ("threshold", pa.float32()),
        ("threshold_low", pa.float32()),
        ("area", pa.int64()),
        ("bbox_xywh", pa.list_(pa.float32(), 4)),
        ("mask", RLE_TYPE),
        ("ignore", RLE_TYPE),
        ("heatmap", pa.binary()),
        ("heatmap_height", pa.int16()),
        ("heatmap_width", pa.int16()),
    ]
)

ERROR_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("sample_index", pa.int32()),
        ("shard", pa.string()),
        ("stage", pa.string()),
        ("kind", pa.string()),
        ("message", pa.string()),
        ("prompt_index", pa.int16()),
    ]
)


# statuses of rows; all others say by what a prompt was rejected
OK = "ok"
EMPTY_MASK = "empty_mask"
ACCEPTED = (OK, EMPTY_MASK)


def has_pixels(row: Mapping[str, Any]) -> bool:
    """Whether there is something to learn from an annotation row: accepted, with at least one pixel."""
    return row["mask"] is not None and row["status"] != EMPTY_MASK
