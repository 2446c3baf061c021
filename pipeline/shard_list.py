"""OUT/shards.parquet: the shards of a job, and the version of each from which its files are made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import UserError
from pipeline.output_folder import SHARDS_FILE

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
# an id becomes part of paths
_SHARD_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


def read_shard_list(output_dir: str) -> list[dict[str, Any]]:
    """The rows of OUT/shards.parquet, in the columns of `SHARDS_SCHEMA`.

    Raises:
        UserError: it is not there, not readable, or holds what this program does not write.
    """
    url = storage.join_url(output_dir, SHARDS_FILE)
    where = storage.shown_url(url)
    try:
        table = pq.read_table(BytesIO(storage.read_bytes(url)))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{where}: cannot be read: {error}") from error
    if not table.schema.equals(SHARDS_SCHEMA):
        raise UserError(f"{where}: expected columns {SHARDS_SCHEMA.names}, found {table.schema.names}")
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows:
        if not _SHARD_ID.fullmatch(row["shard_id"] or "") or row["shard"] is None:
            raise UserError(f"{where}: {row['shard_id']!r} is not the id of a shard")
    return rows


def shard_list_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The content of OUT/shards.parquet."""
    sink = BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SHARDS_SCHEMA), sink, compression="zstd")
    return sink.getvalue()
