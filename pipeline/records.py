"""What is written: the Parquet schemas as constants, and the rows that fill them."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.text import printable

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

MAX_MESSAGE_CHARACTERS = 500

# statuses of rows; all others say by what a prompt was rejected
OK = "ok"
EMPTY_MASK = "empty_mask"
ACCEPTED = (OK, EMPTY_MASK)


def has_pixels(row: Mapping[str, Any]) -> bool:
    """Whether there is something to learn from an annotation row: accepted, with at least one pixel."""
    return row["mask"] is not None and row["status"] != EMPTY_MASK


def received(value: object) -> str:
    """A value of any type and size as an error shows it: in one short, printable line."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 80, 80
    try:
        return printable(short.repr(value))
    # integers of thousands of digits have no text, by a limit of Python's own
    except ValueError:
        return f"a value of type {type(value).__name__} that is too large to be shown"


@dataclass(frozen=True)
class SampleError:
    """One thing that went wrong, as a row of the errors file.

    Attributes:
        stage: open, read, decode, caption, model or mask.
        kind: short machine-readable name.
        message: one sentence for a person.
        key: sample key; None where no sample can be named.
        sample_index: ordinal of the sample in its shard; None where no sample can be named.
        prompt_index: ordinal of the prompt in its sample; None where the whole sample is meant.
        damages_shard: the archive was not read to a sound end, so samples that nothing names may be missing.
    """

    stage: str
    kind: str
    message: str
    key: str | None = None
    sample_index: int | None = None
    prompt_index: int | None = None
    damages_shard: bool = False

    def as_row(self, shard: str) -> dict[str, Any]:
        """The row of the errors file; texts printable, message bounded to MAX_MESSAGE_CHARACTERS."""
        return {
            "key": None if self.key is None else printable(self.key),
            "sample_index": self.sample_index,
            "shard": shard,
            "stage": self.stage,
            "kind": self.kind,
            "message": printable(self.message[:MAX_MESSAGE_CHARACTERS]),
            "prompt_index": self.prompt_index,
        }


@dataclass(frozen=True)
class ShardCounts:
    """How a shard's samples ended; ``samples_in == annotated + empty + failed`` always holds.

    Attributes:
        annotated: samples with at least one annotation row.
        empty: readable samples to which no prompt applies.
        failed: samples with error rows alone.
        rows: annotation rows.
        error_rows: rows of the errors file.
        dropped_prompts: prompts left out by ``prompts.max_per_sample``.
        errors_by_kind: error rows by ``stage/kind``.
        error_examples: for each of these kinds the key of one sample, or where no sample can be named, the
            shard.
    """

    annotated: int = 0
    empty: int = 0
    failed: int = 0
    rows: int = 0
    error_rows: int = 0
    dropped_prompts: int = 0
    errors_by_kind: Mapping[str, int] = field(default_factory=dict)
    error_examples: Mapping[str, str] = field(default_factory=dict)

    @property
    def samples_in(self) -> int:
        """Samples that the shard held."""
        return self.annotated + self.empty + self.failed

    def __add__(self, other: ShardCounts) -> ShardCounts:
        kinds = dict(self.errors_by_kind)
        for kind, count in other.errors_by_kind.items():
            kinds[kind] = kinds.get(kind, 0) + count
        return ShardCounts(
            annotated=self.annotated + other.annotated,
            empty=self.empty + other.empty,
            failed=self.failed + other.failed,
            rows=self.rows + other.rows,
            error_rows=self.error_rows + other.error_rows,
            dropped_prompts=self.dropped_prompts + other.dropped_prompts,
            errors_by_kind=kinds,
            error_examples={**other.error_examples, **self.error_examples},
        )


def total_counts(counts: Iterable[ShardCounts]) -> ShardCounts:
    """The sum over shards."""
    return sum(counts, start=ShardCounts())
