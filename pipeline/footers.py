"""What the footers of a shard's two Parquet files say: whose they are, of which input, and the counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.output_folder import ANNOTATIONS, ERRORS
from pipeline.records import ShardCounts
from pipeline.storage.versions import InputVersion, version_from

FOOTER_READERS = 16
METADATA_KEY = b"legrad"

ShardState = Literal["done", "damaged"]
COUNTS = ("annotated", "empty", "failed", "rows", "error_rows", "dropped_prompts")
UNREADABLE = (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError, pa.ArrowException)


@dataclass(frozen=True)
class ShardFooter:
    """The footer of a shard's annotations, when its errors file belongs to it.

    Attributes:
        shard: URL of the shard, as shown.
        state: done, or damaged: the archive was not read to a sound end.
        counts: outcomes of the samples.
        version: which version of the shard was read.
        content_digest: of all bytes of the shard.
    """

    shard: str
    state: ShardState
    counts: ShardCounts
    version: InputVersion
    content_digest: str


def counts_as_metadata(counts: ShardCounts) -> dict[str, Any]:
    """Counts as they are written in Parquet footers and in ``_SUCCESS``."""
    return {
        "samples_in": counts.samples_in,
        **{name: getattr(counts, name) for name in COUNTS},
        "errors_by_kind": dict(counts.errors_by_kind),
        "error_examples": dict(counts.error_examples),
    }


def counts_from_metadata(metadata: Mapping[str, Any]) -> ShardCounts:
    """The inverse of `counts_as_metadata`; raises KeyError, TypeError or ValueError where it is none."""
    numbers = {name: int(metadata[name]) for name in COUNTS}
    kinds = {str(kind): int(rows) for kind, rows in dict(metadata["errors_by_kind"]).items()}
    examples = {str(kind): str(key) for kind, key in dict(metadata["error_examples"]).items()}
    return ShardCounts(**numbers, errors_by_kind=kinds, error_examples=examples)


def read_footer(url: str) -> dict[str, Any]:
    """This package's metadata in a Parquet file's footer; only the footer is read.

    Raises:
        OSError: the file cannot be read.
        pyarrow.ArrowInvalid: it is not a Parquet file.
        KeyError: it was not written by this package.
    """
    filesystem, path = storage.resolve(url)
    with filesystem.open_input_file(path) as file:
        metadata = pq.ParquetFile(file).metadata.metadata or {}
    return cast("dict[str, Any]", json.loads(metadata[METADATA_KEY]))


def checked_footers(
    output_dir: str, listed: Mapping[str, Mapping[str, Any]], config_hash: str
) -> dict[str, ShardFooter | None]:
    """The footers of published shards, read concurrently.

    Args:
        output_dir: the job's output folder.
        listed: rows of OUT/shards.parquet by shard id: whose files are looked at.
        config_hash: of the job; two that start together may each have found the folder empty.

    Returns:
        By shard id; None where the two files are not of the same attempt, are of another configuration or of
        another version of the input than the one listed, or one of them cannot be read.
    """

    def checked(shard_id: str) -> ShardFooter | None:
        return checked_footer(output_dir, shard_id, listed[shard_id], config_hash)

    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        return dict(zip(listed, pool.map(checked, listed), strict=True))


def checked_footer(
    output_dir: str, shard_id: str, row: Mapping[str, Any], config_hash: str
) -> ShardFooter | None:
    """One of `checked_footers`."""
    name = f"{shard_id}.parquet"
    try:
        annotations = read_footer(storage.join_url(output_dir, ANNOTATIONS, name))
        errors = read_footer(storage.join_url(output_dir, ERRORS, name))
        footer = _parsed(annotations)
        if annotations["attempt"] != errors["attempt"] or annotations["config_hash"] != config_hash:
            return None
    except UNREADABLE:
        return None
    return footer if _is_of_listed_version(footer, row) else None


def _parsed(metadata: Mapping[str, Any]) -> ShardFooter:
    state = metadata["state"]
    if state not in ("done", "damaged"):
        raise ValueError(f"state: expected done or damaged, got {state!r}")
    return ShardFooter(
        shard=str(metadata["shard"]),
        state=state,
        counts=counts_from_metadata(metadata),
        version=version_from(metadata["input"]),
        content_digest=str(metadata["content_digest"]),
    )


def _is_of_listed_version(footer: ShardFooter, row: Mapping[str, Any]) -> bool:
    listed = version_in(row)
    if row.get("moved_from") is not None:
        return not listed.differs_in_size_from(footer.version)
    return not listed.differs_from(footer.version)


def version_in(row: Mapping[str, Any]) -> InputVersion:
    """The version of a shard's input in a row of OUT/shards.parquet."""
    return InputVersion(row["size_bytes"], row["mtime_ns"], row["etag"])
