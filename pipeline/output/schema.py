"""What is written: the Parquet schemas as constants, and the rows that fill them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, TypedDict, get_type_hints

import pyarrow as pa

RLE_TYPE = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])

# of this package's part of a Parquet file's footer
METADATA_KEY = b"legrad"


class AnnotationRow(TypedDict):
    """One row of an annotations file: each column's type in Python, and in Parquet.

    The writer of a shard adds `shard`; every other column is given by whoever makes the row.
    """

    key: Annotated[str, pa.string()]
    sample_index: Annotated[int, pa.int32()]
    shard: Annotated[NotRequired[str], pa.string()]
    prompt_index: Annotated[int, pa.int16()]
    prompt: Annotated[str, pa.string()]
    prompt_truncated: Annotated[bool, pa.bool_()]
    class_id: Annotated[int | None, pa.int32()]
    status: Annotated[str, pa.string()]
    image_height: Annotated[int, pa.int32()]
    image_width: Annotated[int, pa.int32()]
    similarity: Annotated[float, pa.float32()]
    peak: Annotated[float, pa.float32()]
    threshold: Annotated[float | None, pa.float32()]
    threshold_low: Annotated[float | None, pa.float32()]
    area: Annotated[int, pa.int64()]
    bbox_xywh: Annotated[list[float] | None, pa.list_(pa.float32(), 4)]
    mask: Annotated[Mapping[str, Any] | None, RLE_TYPE]
    ignore: Annotated[Mapping[str, Any] | None, RLE_TYPE]
    heatmap: Annotated[bytes | None, pa.binary()]
    heatmap_height: Annotated[int | None, pa.int16()]
    heatmap_width: Annotated[int | None, pa.int16()]


ANNOTATION_SCHEMA = pa.schema(
    [
        (name, column.__metadata__[0])
        for name, column in get_type_hints(AnnotationRow, include_extras=True).items()
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
