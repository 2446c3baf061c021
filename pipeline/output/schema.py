"""Rows of the Parquet files in an output folder: each column with its types in Python and Parquet."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, NotRequired, TypedDict, get_args, get_type_hints

import pyarrow as pa

RLE_TYPE = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])

INSTANCES = "instances"
CONTEXT_HEATMAPS = "context_heatmaps"
TEXT_DISTANCES = "text_distances"
_CONTEXT_TYPE = pa.struct(
    [
        ("text", pa.string()),
        ("kind", pa.string()),
        ("similarity", pa.float32()),
        ("peak", pa.float32()),
        ("heatmap", pa.binary()),
    ]
)
_INSTANCE_TYPE = pa.struct(
    [
        ("area", pa.int64()),
        ("bbox_xywh", pa.list_(pa.float32(), 4)),
        ("score", pa.float32()),
        ("mask", RLE_TYPE),
    ]
)

# key of this package's part of a Parquet file's footer
METADATA_KEY = b"legrad"


class AnnotationRow(TypedDict):
    """A row of OUT/annotations/SHARD.parquet: one prompt of one sample.

    The writer of a shard adds `shard`; the annotator sets all other columns.
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


class ContextRow(TypedDict):
    """An element of the column `context_heatmaps`: the grid of a text beside the prompts of a sample."""

    text: str
    kind: str
    similarity: float
    peak: float
    heatmap: bytes


class MappedAnnotationRow(AnnotationRow):
    """A row of OUT/annotations/SHARD.parquet in jobs that store maps, so that masks can be made again.

    `context_heatmaps` is null on all rows but a sample's first one: background texts, then the neutral text.
    `text_distances` has the distances (`legrad.text_distances`) of the row's text to those of the sample's
    earlier rows, in their order, then to those of its background texts: float32 little-endian, as a list
    would be larger and slower.
    """

    context_heatmaps: Annotated[list[ContextRow] | None, pa.list_(_CONTEXT_TYPE)]
    text_distances: Annotated[bytes | None, pa.binary()]


class InstanceRow(TypedDict):
    """An element of the column `instances`: a part of a row's mask that is an object of its own."""

    area: int
    bbox_xywh: list[float]
    score: float
    mask: Mapping[str, Any]


class SplitAnnotationRow(AnnotationRow):
    """A row of OUT/annotations/SHARD.parquet in jobs that split masks into instances.

    They are disjoint, their union is the mask, and those with the highest scores come first. A row without a
    mask has none (null).
    """

    instances: Annotated[list[InstanceRow] | None, pa.list_(_INSTANCE_TYPE)]


class ErrorRow(TypedDict):
    """A row of OUT/errors/SHARD.parquet: an error of a shard, of a sample or of one prompt."""

    key: Annotated[str | None, pa.string()]
    sample_index: Annotated[int | None, pa.int32()]
    shard: Annotated[str, pa.string()]
    stage: Annotated[str, pa.string()]
    kind: Annotated[str, pa.string()]
    message: Annotated[str, pa.string()]
    prompt_index: Annotated[int | None, pa.int16()]


class ShardRow(TypedDict):
    """A row of OUT/shards.parquet: a shard, and the version of it from which its files are made.

    `moved_from` is the URL that the shard had when its files were made, if it has moved since.
    """

    shard_id: Annotated[str, pa.string()]
    shard: Annotated[str, pa.string()]
    size_bytes: Annotated[int | None, pa.int64()]
    mtime_ns: Annotated[int | None, pa.int64()]
    etag: Annotated[str | None, pa.string()]
    moved_from: Annotated[str | None, pa.string()]


class CompactedRow(TypedDict):
    """A row of OUT/compacted.parquet: which parts of a compacted folder hold the rows of a shard, and where.

    Parts are numbers of files; `footer` is the metadata in the footer of the shard's own files, as it was.
    """

    shard_id: Annotated[str, pa.string()]
    annotations_part: Annotated[int, pa.int32()]
    annotations_first_row: Annotated[int, pa.int64()]
    rows: Annotated[int, pa.int64()]
    errors_part: Annotated[int, pa.int32()]
    errors_first_row: Annotated[int, pa.int64()]
    error_rows: Annotated[int, pa.int64()]
    footer: Annotated[str, pa.string()]


class FootersRow(TypedDict):
    """A row of the cache of `legrad status`: the footers of a shard's two files, and the versions of both."""

    shard_id: Annotated[str, pa.string()]
    annotations_size_bytes: Annotated[int, pa.int64()]
    annotations_mtime_ns: Annotated[int, pa.int64()]
    errors_size_bytes: Annotated[int, pa.int64()]
    errors_mtime_ns: Annotated[int, pa.int64()]
    annotations_footer: Annotated[str, pa.string()]
    errors_footer: Annotated[str, pa.string()]


def _schema_of(row_type: type) -> pa.Schema:
    columns = get_type_hints(row_type, include_extras=True).items()
    return pa.schema([pa.field(name, column.__metadata__[0]) for name, column in columns])


def _required_columns(row_type: type) -> frozenset[str]:
    return frozenset(
        name for name, kind in get_type_hints(row_type).items() if type(None) not in get_args(kind)
    )


_ROWS = (AnnotationRow, ErrorRow, ShardRow, CompactedRow, FootersRow)
ANNOTATION_SCHEMA, ERROR_SCHEMA, SHARDS_SCHEMA, COMPACTED_SCHEMA, FOOTERS_SCHEMA = map(_schema_of, _ROWS)
_MAP_COLUMNS, _INSTANCE_COLUMNS = (
    [field for field in _schema_of(row_type) if field.name not in ANNOTATION_SCHEMA.names]
    for row_type in (MappedAnnotationRow, SplitAnnotationRow)
)
# columns in which every row has a value
ANNOTATION_REQUIRED, ERROR_REQUIRED, SHARDS_REQUIRED, COMPACTED_REQUIRED, FOOTERS_REQUIRED = map(
    _required_columns, _ROWS
)


def annotation_schema(*, with_instances: bool = False, with_maps: bool = False) -> pa.Schema:
    """Return the columns of annotations files.

    Args:
        with_instances: whether the job splits masks, which adds the column `instances`.
        with_maps: whether the job stores maps, which adds `context_heatmaps` and `text_distances`.
    """
    further = [*(_MAP_COLUMNS if with_maps else ()), *(_INSTANCE_COLUMNS if with_instances else ())]
    return pa.schema([*ANNOTATION_SCHEMA, *further])


def annotation_schema_of(column_names: Collection[str]) -> pa.Schema:
    """Return the columns of annotations files that have columns of these names."""
    return annotation_schema(
        with_instances=INSTANCES in column_names, with_maps=TEXT_DISTANCES in column_names
    )


# statuses of annotation rows; every other status is the name of the filter that rejected the prompt
OK = "ok"
EMPTY_MASK = "empty_mask"
ACCEPTED = (OK, EMPTY_MASK)


def has_pixels(row: Mapping[str, Any]) -> bool:
    """Return whether an annotation row has a mask with at least one pixel."""
    return row["mask"] is not None and row["status"] != EMPTY_MASK
