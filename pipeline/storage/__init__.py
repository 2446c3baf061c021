"""Local and remote files: name them, list them, read them to the last byte, and publish them in one step.

Local paths, ``s3://`` and ``gs://`` can be read and written; ``http://`` and ``https://`` only read.
"""

from pipeline.storage.filesystems import check_folder, resolve
from pipeline.storage.limits import MIN_READ_BYTES_PER_S, ReadLimits
from pipeline.storage.listing import find_shards, list_shards
from pipeline.storage.publishing import (
    TEMPORARY_SUFFIX,
    exists,
    list_entries,
    list_names,
    list_paths,
    list_versions,
    move,
    publish,
    remove,
    remove_staging,
    sweep_staging,
)
from pipeline.storage.reading import (
    READAHEAD_BYTES,
    DigestingStream,
    open_shard,
    read_bytes,
    read_text,
    require_unchanged,
    version_now,
)
from pipeline.storage.scratch import Spool, scratch_errors
from pipeline.storage.sources import InputVersion, ShardSource
from pipeline.storage.urls import (
    absolute,
    join_url,
    shard_id,
    shard_name,
    shown_text,
    shown_url,
    with_plain_paths,
)

__all__ = [
    "MIN_READ_BYTES_PER_S",
    "READAHEAD_BYTES",
    "TEMPORARY_SUFFIX",
    "DigestingStream",
    "InputVersion",
    "ReadLimits",
    "ShardSource",
    "Spool",
    "absolute",
    "check_folder",
    "exists",
    "find_shards",
    "join_url",
    "list_entries",
    "list_names",
    "list_paths",
    "list_shards",
    "list_versions",
    "move",
    "open_shard",
    "publish",
    "read_bytes",
    "read_text",
    "remove",
    "remove_staging",
    "require_unchanged",
    "resolve",
    "scratch_errors",
    "shard_id",
    "shard_name",
    "shown_text",
    "shown_url",
    "sweep_staging",
    "version_now",
    "with_plain_paths",
]
