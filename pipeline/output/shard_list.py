"""OUT/shards.parquet: the shards of a job, and the version of each from which its files are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SHARDS_SCHEMA = pa.schema(
    [
        ("shard_id", pa.string()),
        ("shard", pa.string()),
        ("size_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("etag", pa.string()),
        # the URL that the shard had when its files were made, where it has moved since
        ("moved_from", pa.string()),
    ]
)


def shard_list_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The content of OUT/shards.parquet."""
    sink = BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SHARDS_SCHEMA), sink, compression="zstd")
    return sink.getvalue()
